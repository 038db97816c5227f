from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from imagevec import Preprocessing
from imagevec.engines.torch_engine import TorchEngine
from imagevec.images.decode import Pixels
from imagevec.models.features import example_input
from imagevec.models.registry import find_source
from imagevec.models.source import IMAGENET
from tests.helpers.factories import Tiny
from tests.helpers.images import cosine, photo
from tests.helpers.pipeline import engine_of, pixels_of

MODELS = ["squeezenet1_1", "resnet18", "mobilenet_v3_small"]


def images(count: int) -> Pixels:
    """uint8 ``(count, 224, 224, 3)``."""
    return np.stack([pixels_of(photo(224, 224, seed)) for seed in range(count)])


@pytest.fixture(scope="module", params=MODELS)
def engine(request: pytest.FixtureRequest) -> Any:
    return engine_of(model=request.param, weights="random")


def test_a_batch_of_one_keeps_its_axis(engine):
    vectors = engine(images(1))
    assert vectors.dtype == np.float32
    assert vectors.ndim == 2
    assert len(vectors) == 1


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_a_vector_does_not_depend_on_batch_size_place_or_neighbours(engine):
    batch = images(7)
    alone = np.concatenate([engine(image[None]) for image in batch])
    assert close(engine(batch), alone)
    assert close(engine(np.ascontiguousarray(batch[::-1]))[::-1], alone)
    assert close(engine(batch[2:5]), alone[2:5])
    extreme = np.stack([np.zeros_like(batch[0]), batch[3], np.full_like(batch[0], 255)])
    assert close(engine(extreme)[1], alone[3])


def test_images_are_told_apart(engine):
    vectors = engine(images(4))
    assert len(np.unique((vectors / np.abs(vectors).max()).round(3), axis=0)) == 4


def test_the_same_images_give_the_same_vectors(engine):
    np.testing.assert_array_equal(engine(images(3)), engine(images(3)))


def test_the_batch_is_not_copied(monkeypatch):
    engine: Any = engine_of(model="resnet18", weights="random")
    batch = images(2)
    seen: list[Any] = []
    run = engine._model.forward

    def forward(x):
        seen.append(x)
        return run(x)

    monkeypatch.setattr(engine._model, "forward", forward)
    engine(batch)
    assert seen[0].data_ptr() == batch.ctypes.data
    assert seen[0].permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


def test_its_input_is_left_as_it_is(engine):
    batch = images(2)
    copy = batch.copy()
    engine(batch)
    np.testing.assert_array_equal(batch, copy)


@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_model_itself(model):
    source = find_source(model)
    example = functools.partial(example_input, IMAGENET)
    plain = source.to_features(source.module(IMAGENET, None), "pooled", False, example)
    mean = torch.tensor(Preprocessing().mean).view(3, 1, 1)
    std = torch.tensor(Preprocessing().std).view(3, 1, 1)
    batch = images(3)
    with torch.inference_mode():
        expected = plain((torch.from_numpy(batch).permute(0, 3, 1, 2) / 255 - mean) / std)
    vectors = engine_of(model=model, weights="random")(batch)
    assert (cosine(vectors, expected) >= 0.99999).all()
    np.testing.assert_allclose(vectors, expected, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_close_to_float32(model):
    float32 = engine_of(model=model, weights="random")(images(4))
    bfloat16 = engine_of(model=model, weights="random", precision="bfloat16")(images(4))
    assert bfloat16.dtype == np.float32
    assert not np.array_equal(bfloat16, float32)
    assert (cosine(bfloat16, float32) >= 0.99).all()


def test_dropout_and_batch_statistics_are_off():
    class Noisy(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(self.dropout(self.norm(images)))

    engine = engine_of(model=Noisy, weights="random")
    np.testing.assert_array_equal(engine(images(2)), engine(images(2)))
    assert close(engine(images(2))[:1], engine(images(1)))


def test_a_model_that_cannot_be_traced_runs_as_it_is():
    class Branching(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) if images.mean() > -100 else super().forward(-images)

    assert engine_of(model=Branching, weights="random")(images(2)).shape == (2, 8)


def test_a_batch_that_does_not_fit_is_halved():
    class OutOfMemory(torch.nn.Module):
        sizes: list[int] = []

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(batch))
            if len(batch) > 3:
                raise torch.OutOfMemoryError("too many")
            return batch.mean((2, 3))

    model = OutOfMemory()
    engine = TorchEngine(model, Preprocessing(), "cpu", "float32")
    vectors = engine(images(8))
    assert vectors.shape == (8, 3)
    np.testing.assert_allclose(vectors[5:6], engine(images(8)[5:6]), rtol=1e-5)
    model.sizes.clear()
    engine(images(8))
    assert max(model.sizes) <= 3


def test_one_image_that_does_not_fit_is_an_error():
    class OutOfMemory(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("too large")

    engine = TorchEngine(OutOfMemory(), Preprocessing(), "cpu", "float32")
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        engine(images(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(
    ("precision", "lowest"), [("float32", 0.9999), ("bfloat16", 0.99), ("float16", 0.999)]
)
def test_cuda_gives_the_vectors_of_the_cpu(precision, lowest):
    source = find_source("resnet18")
    example = functools.partial(example_input, IMAGENET)
    engines = [
        TorchEngine(
            source.to_features(source.module(IMAGENET, None), "pooled", False, example),
            Preprocessing(),
            device,
            precision if device == "cuda" else "float32",
        )
        for device in ("cpu", "cuda")
    ]
    on_cpu, on_cuda = (engine(images(5)) for engine in engines)
    assert (cosine(on_cpu, on_cuda) >= lowest).all()

"""Checks on the driver, before a model is used: it is a function of its input, and was converted.

The vector of an image must not depend on the images beside it in a batch, or on those before it. An
engine that was made from a model must return the model's vectors. Both are found by running them on
a few inputs of different brightness or length, alone and in batches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from imagevec import cache
from imagevec.engines import Engine, Inputs, devices
from imagevec.engines.torch_engine import PixelModel
from imagevec.errors import ImageVecError, OptionError, WeightsError
from imagevec.images.decode import Pixels
from imagevec.models.source import ConversionError
from imagevec.spec import Preprocessing, Tokenization
from imagevec.texts.tokenize import Tokenizer

if TYPE_CHECKING:
    from imagevec.models.features import FeatureModel

Vectors = npt.NDArray[np.float32]
Batches = Callable[[Sequence[int]], Inputs]
"""A function from the numbers of inputs to a new batch of them."""

# The lowest and highest values of images: a dark, a varied and a bright one, and another dark and
# bright one, whose ranges contain those of the first. Models may divide by the maximum of a batch.
_RANGES = ((6, 70), (12, 240), (165, 247), (0, 95), (140, 255))
_ALL = (0, 1, 2)
_ALONE = ((0,), (2,))
_ALIKE = ((0, 3), (2, 4))

# As many as in _ALL. The last is longer than any context.
_TEXTS = (
    "dog",
    "a photo of two people who walk along a beach at sunset, with a small brown dog behind them",
    " ".join(["a plate of food on a wooden table, next to a glass of water,"] * 12),
)

# The batches of 8, 3, 2 and 1 inputs for engines.
_BATCHES = ((0, 1, 2, 2, 0, 1, 1, 0), (2, 0, 1), (0, 1), (2,))

# The allowed distance between two vectors of an input. The first is relative to the vector's length
# and to its distance from the mean of all vectors, whichever is smaller: those of untrained models
# are nearly equal. 0.01 of the length is a cosine of 0.99995. The second is relative to the longest
# vector, for vectors that only differ by rounding errors. Of 40 models of torchvision and timm with
# random weights, OpenVINO's distance to PyTorch was at most 1.4e-6 of the length, and 2.5e-5 of the
# distance from the mean where that was more than 1e-4 of the length.
_TOLERANCE = 1e-2
_ROUNDING = 1e-4


def check_conversion(model: FeatureModel, load: Callable[[int], Engine]) -> None:
    """Compares the vectors of an engine with PyTorch's, in batches of 8, 3, 2 and 1 inputs.

    Args:
        model: The model.
        load: A function from a number of threads to an engine that was made from the model.

    Raises:
        ConversionError: They differ.
        OptionError: As ``Reference``.
        WeightsError: As ``Reference``.
    """
    batch = _batches(model.preprocessing)
    with devices.within_quota() as threads, ThreadPoolExecutor(max_workers=1) as executor:
        # PyTorch's threads wait actively for each other: beside the engine's, few are faster.
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        outputs = executor.submit(lambda: run_batches(load(threads), batch))
        reference = Reference(model)
    reference.compare(outputs.result())


def run_batches(engine: Engine, batch: Batches) -> list[Vectors | Exception]:
    """Runs an engine on batches of 8, 3, 2 and 1 inputs. Returns an error in place of vectors."""
    outputs: list[Vectors | Exception] = []
    for numbers in _BATCHES:
        try:
            outputs.append(engine(batch(numbers)))
        except MemoryError:
            raise
        except Exception as error:  # of the library
            outputs.append(error)
    return outputs


class Reference:
    """The vectors that PyTorch computes for a few inputs.

    Args:
        model: The model, which is run on single inputs and on a batch.

    Attributes:
        branches: Whether the model chooses what to compute by the brightness of a whole batch.

    Raises:
        OptionError: The model returns another number of vectors, vectors that are not finite, or
            different vectors for the same input.
        WeightsError: The vectors are not finite because the weights are not.
    """

    def __init__(self, model: FeatureModel) -> None:
        self._name = model.source.name
        self._module = model.module
        self._sizes = model.spec.sizes
        self._batch = _batches(model.preprocessing)
        self._kind = "text" if isinstance(model.preprocessing, Tokenization) else "image"
        self._forward = _forward(model)
        self._together = self._run(_ALL)
        buffers = _float_buffers(self._module)
        self.branches = not self._is_a_function()
        if _changed(buffers, self._module):
            self._check_state()

    def compare(self, outputs: Sequence[Vectors | Exception]) -> None:
        """Compares the result of ``run_batches`` with the vectors of PyTorch.

        Raises:
            ConversionError: They differ.
        """
        if self.branches:
            raise ConversionError("it computes different functions of dark and bright images")
        for numbers, vectors in zip(_BATCHES, outputs, strict=True):
            if isinstance(vectors, Exception):
                raise ConversionError(
                    f"it fails for a batch of {len(numbers)} ({_lines(vectors)[-1]})"
                ) from vectors
            difference = self._difference(vectors, self._together[list(numbers)])
            if difference:
                raise ConversionError(
                    f"for a batch of {len(numbers)}, it differs from PyTorch: {difference}"
                )

    def _is_a_function(self) -> bool:
        """Compares the vectors of a dark and of a bright input alone with those in a batch.

        Returns:
            Whether they are equal. If not, they are in batches of images with a like brightness.

        Raises:
            OptionError: The vectors are random, or depend on the other inputs in a batch.
        """
        random_state = torch.get_rng_state()
        alone = [self._run(numbers) for numbers in _ALONE]
        is_random = not random_state.equal(torch.get_rng_state())
        found = [
            self._difference(vectors, self._together[list(numbers)])
            for numbers, vectors in zip(_ALONE, alone, strict=True)
        ]
        if not any(found) and not is_random:
            return True
        runs = (self._run(_ALL) for _ in range(3 if is_random else 1))
        differences = (self._difference(vectors, self._together) for vectors in runs)
        again = next(filter(None, differences), None)
        if again:
            raise self._refused(
                f"two runs on the same {self._kind}s differ: {again}",
                "random numbers, such as dropout that is always on, or state from earlier runs",
                (_ALONE[0], _ALONE[0]),
            )
        if not any(found):
            return True
        if self._kind == "image":
            pairs = [self._run(numbers)[:1] for numbers in _ALIKE]
            if not any(map(self._difference, pairs, alone)):
                return False
        difference = next(filter(None, found))
        raise self._refused(
            f"the vector of one {self._kind} depends on the others in its batch: {difference}",
            "statistics of the batch, such as those of a BatchNorm without running statistics",
            (_ALONE[0], _ALL),
        )

    def _check_state(self) -> None:
        """Raises ``OptionError`` if a forward pass changes a buffer that the same input changed.

        Two vectors do not show slow changes, such as those of a running mean.
        """
        self._run(_ALL)
        buffers = _float_buffers(self._module)
        self._run(_ALL)
        changed = _changed(buffers, self._module)
        if changed:
            raise OptionError(
                f"model={self._name!r} is not valid: each forward pass changes its buffer "
                f"{_public(changed)!r}, so that vectors can depend on the batches before"
            )

    def _run(self, numbers: Sequence[int]) -> Vectors:
        """Runs the model on the inputs with these numbers, to ``(N, D)``."""
        try:
            vectors = self._forward(self._batch(numbers))
        except (ImageVecError, MemoryError):
            raise
        except Exception as error:  # of the model's own code
            raise OptionError(
                f"model={self._name!r} is not valid: it fails for a batch of {len(numbers)} "
                f"{self._kind}s ({type(error).__name__}: {_lines(error)[0]})"
            ) from error
        shape = (len(numbers), sum(self._sizes))
        if vectors.shape != shape:
            raise OptionError(
                f"model={self._name!r} is not valid: its output for a batch of {len(numbers)} "
                f"has the shape {vectors.shape}, not {shape}"
            )
        if not np.isfinite(vectors).all():
            raise self._not_finite(vectors)
        return vectors

    def _difference(self, vectors: Vectors, expected: Vectors) -> str | None:
        """Returns how vectors differ from those that are expected, or ``None``."""
        if vectors.shape != expected.shape:
            return f"the output has the shape {vectors.shape} instead of {expected.shape}"
        ends = list(itertools.accumulate(self._sizes))[:-1]
        layers = (np.split(each.astype(float), ends, axis=1) for each in (vectors, expected))
        scales = np.split(self._together.astype(float), ends, axis=1)
        for found, wanted, scale in zip(*layers, scales, strict=True):
            distances = np.linalg.norm(found - wanted, axis=1)
            lengths = np.linalg.norm(wanted, axis=1)
            spreads = np.linalg.norm(wanted - scale.mean(axis=0), axis=1)
            rounding = _ROUNDING * np.linalg.norm(scale, axis=1).max()
            allowed = _TOLERANCE * np.minimum(lengths, spreads) + rounding
            if not (distances <= allowed).all():  # also if a distance is NaN
                worst = int(np.argmax(np.nan_to_num(distances / (allowed + 1e-300), nan=np.inf)))
                length = np.linalg.norm(found[worst])
                cosine = found[worst] @ wanted[worst] / (length * lengths[worst] + 1e-300)
                return (
                    f"a vector's cosine is {cosine:.4f} and its length {length:.4g} instead of "
                    f"{lengths[worst]:.4g}"
                )
        return None

    def _refused(
        self, what: str, causes: str, batches: tuple[Sequence[int], Sequence[int]]
    ) -> OptionError:
        where = self._first_difference(*batches)
        seen = f", first in the output of {where}" if where else ""
        return OptionError(f"model={self._name!r} is not valid: {what}{seen}. Causes are {causes}")

    def _not_finite(self, vectors: Vectors) -> ImageVecError:
        rows = int((~np.isfinite(vectors)).any(axis=1).sum())
        number = "NaN" if np.isnan(vectors).any() else "infinity"
        found = f"{rows} of {len(vectors)} vectors contain {number}"
        tensors = [*self._module.named_parameters(), *self._module.named_buffers()]
        names = [name for name, tensor in tensors if tensor.isnan().any()]
        names += [name for name, tensor in self._module.named_parameters() if tensor.isinf().any()]
        if names:
            listed = ", ".join(repr(_public(name)) for name in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return WeightsError(
                f"the weights of {self._name!r} are not finite: {listed}{more}; {found}"
            )
        return OptionError(
            f"model={self._name!r} is not valid: {found}, although its weights are finite"
        )

    def _first_difference(self, first: Sequence[int], second: Sequence[int]) -> str | None:
        """Returns the first submodule whose output for the first input of two batches differs."""
        outputs, others = (self._outputs(numbers) for numbers in (first, second))
        for (name, output), (other_name, other) in zip(outputs, others, strict=False):
            if name != other_name or output.shape != other.shape:
                return None
            if (output - other).norm() > _TOLERANCE * output.norm():
                return f"{_public(name)!r} ({type(self._module.get_submodule(name)).__name__})"
        return None

    def _outputs(self, numbers: Sequence[int]) -> list[tuple[str, torch.Tensor]]:
        """Returns the names and first outputs of submodules without submodules, in their order."""
        outputs: list[tuple[str, torch.Tensor]] = []

        def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.ndim:
                outputs.append((name, output[0].float().clone()))

        hooks = [
            module.register_forward_hook(functools.partial(record, name))
            for name, module in self._module.named_modules()
            if not any(module.children())
        ]
        try:
            self._forward(self._batch(numbers))
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


def _forward(model: FeatureModel) -> Callable[[Inputs], Vectors]:
    module, how = model.module, model.preprocessing
    if isinstance(how, Preprocessing):
        module = PixelModel(module, how).eval()

    def forward(inputs: Inputs) -> Vectors:
        with torch.inference_mode():
            vectors = module(torch.from_numpy(inputs)).float().numpy()
        return np.array(vectors, np.float32)  # the next run may overwrite the model's own tensor

    return forward


def _batches(how: Preprocessing | Tokenization) -> Batches:
    if isinstance(how, Tokenization):
        tokenizer = Tokenizer(cache.stored(how.vocabulary), how)
        tokens = list(map(tokenizer, _TEXTS))
        return lambda numbers: tokenizer.stack([tokens[number] for number in numbers])
    shape = how.input_shape
    return lambda numbers: np.stack([_image(shape, number) for number in numbers])


@functools.lru_cache(maxsize=len(_RANGES))
def _image(shape: tuple[int, int], number: int) -> Pixels:
    """Returns noise whose amplitude is proportional to 1 / frequency, uint8 ``(H, W, 3)``.

    So is that of natural images (Field, 1987, "Relations between the statistics of natural images
    and the response properties of cortical cells").
    """
    rng = np.random.default_rng(number)
    height, width = shape
    image = np.zeros((height, width, 3))
    side = 2
    while side <= max(2, height, width):
        octave = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        smooth = octave.resize((width, height), Image.Resampling.BICUBIC)
        image += (np.asarray(smooth) - 127.5) / side
        side *= 2
    image = (image - image.min()) / (image.max() - image.min())
    lowest, highest = _RANGES[number]
    pixels: Pixels = np.round(lowest + (highest - lowest) * image).astype(np.uint8)
    return pixels


def _float_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = module.named_buffers()
    return {name: buffer.clone() for name, buffer in buffers if buffer.is_floating_point()}


def _changed(before: dict[str, torch.Tensor], module: nn.Module) -> str | None:
    """Returns the name of a buffer that was changed, and not replaced by one of another shape."""
    for name, buffer in _float_buffers(module).items():
        old = before.get(name, buffer)
        if old.shape == buffer.shape and not torch.allclose(old, buffer, 0, 0, equal_nan=True):
            return name
    return None


def _public(name: str) -> str:
    """Returns the name of a tensor or submodule in the user's model, which was wrapped."""
    while name.startswith("model."):
        name = name.removeprefix("model.")
    return name


def _lines(error: Exception) -> list[str]:
    return [line.strip()[:300] for line in str(error).strip().splitlines()] or [""]

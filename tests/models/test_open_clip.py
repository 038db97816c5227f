"""Models of open_clip against open_clip itself: small ones of each kind, and four real ones."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from imagevec import (
    ImageVectorizer,
    MissingExtraError,
    OptionError,
    WeightsError,
    list_models,
    quantize,
    register_model,
    text_features,
)
from imagevec.engines.torch_engine import normalize
from imagevec.images.preprocess import resize_and_crop
from imagevec.models import open_clip as module
from imagevec.models.open_clip import OpenClipSource
from imagevec.models.registry import find_source
from tests.helpers.clip import TINY, built, encoded, write_tokenizer
from tests.helpers.factories import Tiny
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import decoded

TEXTS = ["a red shoe", "", "Grüße 🐱 of a small dog!", "word " * 100, "dress"]
IMAGE = photo(120, 90)
PNG = encode(IMAGE)
REAL = ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "MobileCLIP-S1"]


def lowest_cosine(ours: np.ndarray, theirs: np.ndarray) -> Any:
    return np.min([cosine(a, b) for a, b in zip(ours, theirs, strict=True)])  # NaN is lowest


def image_vector(open_clip, name: str) -> np.ndarray:
    """What open_clip's ``encode_image`` returns for ``IMAGE``, with its own transform."""
    model = built(open_clip, name)
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)
    with torch.inference_mode():
        return model.encode_image(transform(IMAGE)[None]).numpy()[0]


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("name", TINY)
def test_both_towers_compute_what_open_clip_does(clip, name, engine, tmp_path):
    options: dict[str, Any] = {"model": name, "weights": "random", "engine": engine}
    if name == "open_clip/tiny-coca":  # its image tower is drawn after the other, alone it is first
        state_dict = built(clip, name).state_dict()
        options["weights"] = tmp_path / "weights.pt"
        torch.save(state_dict, options["weights"])
    ours = text_features(TEXTS, **options, batch_size=2)
    assert ours.dtype == np.float32
    assert lowest_cosine(ours, encoded(clip, name, TEXTS)) >= 0.9999
    image: Any = ImageVectorizer(**options).extract_features(PNG)
    assert cosine(image, image_vector(clip, name)) >= 0.9999
    assert len(image) == ours.shape[1]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # by timm
@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tiny-vit", 128),
        ("tiny-vit", (96, 160)),
        ("tiny-coca", (96, 64)),
        ("tiny-mobile", (192, 128)),
        ("tiny-siglip", (160, 96)),
    ],
    ids=str,
)
def test_another_input_size_is_open_clips(clip, name, size, engine, tmp_path):
    weights = tmp_path / "weights.pt"
    tensors = dict(built(clip, f"open_clip/{name}").state_dict())
    for key in ("visual.positional_embedding", "visual.trunk.pos_embed"):
        if key in tensors:
            tensors[key] = tensors[key] * 50  # positions of random weights count for little
    torch.save(tensors, weights)
    model = clip.create_model(
        name, pretrained=str(weights), force_image_size=size, pretrained_text=False
    )
    transform = clip.image_transform(size, is_train=False, resize_mode="shortest")
    images = [photo(*shape, seed) for seed, shape in enumerate([(201, 333), (64, 47), (97, 61)])]
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([transform(image) for image in images]))
    vectorizer: Any = ImageVectorizer(
        model=f"open_clip/{name}", weights=str(weights), input_size=size, engine=engine
    )
    for image, wanted in zip(images, expected, strict=True):
        assert cosine(vectorizer.extract_features(encode(image)), wanted) >= 0.9999


def test_a_size_of_a_bilinear_tag_is_open_clips(clip, monkeypatch):
    monkeypatch.setitem(
        clip.pretrained._PRETRAINED, "tiny-vit", {"own": {"interpolation": "bilinear"}}
    )
    source = OpenClipSource("tiny-vit")
    preprocessing = source.preprocessing(None, "own")
    for size in (96, (96, 160)):
        transform = clip.image_transform(
            size, is_train=False, interpolation="bilinear", mean=preprocessing.mean
        )
        resized = source.resized(preprocessing, size)
        pixels = torch.from_numpy(resize_and_crop(np.array(IMAGE), resized).copy())
        ours = normalize(pixels.permute(2, 0, 1)[None], resized)
        assert cosine(ours.flatten(), transform(IMAGE).flatten()) >= 0.9999


@pytest.mark.parametrize(
    ("name", "size"), [("tiny-resnet", 96), ("tiny-vit", (32, 128)), ("tiny-coca", (128, 32))]
)
def test_a_size_that_open_clip_cannot_resize_to_is_refused(clip, name, size):
    fragment = "cannot resize the position embeddings of .*; its own size is 64"
    with pytest.raises(OptionError, match=f"input_size=.* is not valid: .*{fragment}"):
        ImageVectorizer(model=f"open_clip/{name}", weights="random", input_size=size)


@pytest.mark.all_models
@pytest.mark.models
@pytest.mark.parametrize("name", REAL)
def test_real_models_compute_what_open_clip_does(clip, name, tmp_path, monkeypatch):
    config = clip.get_model_config(name)
    if config["text_cfg"].get("hf_tokenizer_name"):  # its vocabulary is not in the package
        write_tokenizer(tmp_path / "tokenizer")
        config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "tokenizer")
        monkeypatch.setitem(clip.factory._MODEL_CONFIGS, name, config)
    texts = encoded(clip, name, TEXTS)
    model = built(clip, name)
    preprocessing = find_source(f"open_clip/{name}").preprocessing(None)
    pixels = resize_and_crop(decoded(PNG).pixels, preprocessing)
    with torch.inference_mode():
        channels_first = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        image = model.encode_image(normalize(channels_first, preprocessing)).numpy()[0]
    for engine in ("torch", "openvino"):
        options: dict[str, Any] = {
            "model": f"open_clip/{name}",
            "weights": "random",
            "engine": engine,
        }
        assert lowest_cosine(text_features(TEXTS, **options), texts) >= 0.9999
        assert cosine(ImageVectorizer(**options).extract_features(PNG), image) >= 0.9999


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_lower_precisions_are_near(clip, engine, precision):
    options: dict[str, Any] = {"model": "open_clip/tiny-vit", "weights": "random", "engine": engine}
    exact = text_features(TEXTS, **options)
    assert lowest_cosine(text_features(TEXTS, **options, precision=precision), exact) >= 0.999


def test_normalized_vectors_have_length_1(clip):
    vectors = text_features(
        TEXTS, model="open_clip/tiny-vit", weights="random", normalize=True, engine="torch"
    )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "tag"),
    [("ViT-B-32", "laion2b_s34b_b79k"), ("ViT-L-14", "laion2b_s32b_b82k"), ("RN50", "cc12m")]
    + [
        ("ViT-B-16-SigLIP", "webli"),
        ("MobileCLIP-S1", "datacompdr"),
        ("ViT-H-14-378-quickgelu", "dfn5b"),
    ],
    ids=str,
)
def test_the_preprocessing_of_a_tag_is_its_transform(clip, name, tag):
    config = clip.pretrained.get_pretrained_cfg(name, tag)
    source = find_source(f"open_clip/{name}")
    preprocessing = source.preprocessing(None, tag)
    wanted = clip.transform.merge_preprocess_dict(clip.transform.PreprocessCfg(), config)
    wanted["size"] = preprocessing.crop_size
    transform = clip.transform.image_transform_v2(clip.transform.PreprocessCfg(**wanted), False)
    for size in [(500, 375), (90, 200)]:
        image = photo(*size)
        pixels = resize_and_crop(np.array(image), preprocessing)
        channels_first = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        ours = normalize(channels_first, preprocessing)
        assert cosine(ours.flatten(), transform(image).flatten()) >= 0.9999


def test_tags_of_the_quickgelu_variant_are_no_default(clip, monkeypatch):
    config = clip.get_model_config("tiny-vit")
    monkeypatch.setitem(clip.factory._MODEL_CONFIGS, "tiny-vit-quickgelu", config)
    own = {"mean": (0.1, 0.2, 0.3)}
    tags = {"other": {"mean": (0.9, 0.9, 0.9), "quick_gelu": True}, "own": own}
    monkeypatch.setitem(clip.pretrained._PRETRAINED, "tiny-vit", tags)
    source = OpenClipSource("tiny-vit")
    assert source._tag("DEFAULT") == own
    for weights in ("DEFAULT", "random", "weights.pt", "own"):
        assert source.preprocessing(None, weights).mean == (0.1, 0.2, 0.3)
    with pytest.raises(OptionError, match="use model='open_clip/tiny-vit-quickgelu'"):
        source.weights("other")


def test_every_tag_has_a_preprocessing(clip):
    for name, tag in clip.list_pretrained():
        source = find_source(f"open_clip/{name}")
        assert min(source.preprocessing(None, tag).input_shape) >= 224


def test_a_side_is_not_square(clip, monkeypatch):
    config = clip.get_model_config("tiny-vit")
    config["vision_cfg"]["image_size"] = [64, 32]
    monkeypatch.setitem(clip.factory._MODEL_CONFIGS, "tiny-vit", config)
    with pytest.raises(OptionError, match=r"not supported \(image_size=\[64, 32\]"):
        find_source("open_clip/tiny-vit").preprocessing(None)


def save_weights(open_clip, name: str, path, seed: int = 1):
    torch.manual_seed(seed)
    model = open_clip.create_model(name.removeprefix("open_clip/"), pretrained_text=False).eval()
    state_dict = {key: value.contiguous() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state_dict.items()}}, path)
    return model


@pytest.mark.parametrize("name", ["open_clip/tiny-vit", "open_clip/tiny-siglip"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_file_of_weights(clip, name, suffix, tmp_path):
    model = save_weights(clip, name, tmp_path / f"weights{suffix}")
    tokens = clip.get_tokenizer(name.removeprefix("open_clip/"))(TEXTS)
    with torch.inference_mode():
        expected = model.encode_text(tokens).numpy()
    path = tmp_path / f"weights{suffix}"
    ours = text_features(TEXTS, model=name, weights=path, engine="torch")
    assert lowest_cosine(ours, expected) >= 0.9999


class Shell(nn.Module):
    """A module with the tensors of another, by which TorchScript saves them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def as_openai_archive(state_dict: dict[str, torch.Tensor], path) -> None:
    """Writes a TorchScript archive in half precision, with the sizes as tensors, as OpenAI did."""
    root = Shell()
    sizes = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    tensors = {key: tensor.half() for key, tensor in state_dict.items()}
    for key, tensor in {**tensors, **{k: torch.tensor(n) for k, n in sizes.items()}}.items():
        *parts, name = key.split(".")
        module: Any = root
        for part in parts:
            if part not in module._modules:
                module.add_module(part, Shell())
            module = module._modules[part]
        module.register_buffer(name, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(root), path)


def as_averages(state_dict: dict[str, torch.Tensor], path) -> None:
    others = {key: torch.zeros_like(tensor) for key, tensor in state_dict.items()}
    torch.save({"model": others, "model_ema": {"module": state_dict}}, path)


def as_lightning(state_dict: dict[str, torch.Tensor], path) -> None:
    prefixed = {f"model._orig_mod.{key}": tensor for key, tensor in state_dict.items()}
    torch.save({"state_dict": {**prefixed, "loss.labels": torch.ones(3)}, "epoch": 3}, path)


@pytest.mark.parametrize("write", [as_openai_archive, as_averages, as_lightning])
def test_a_checkpoint(clip, write, tmp_path):
    name = "open_clip/tiny-vit"
    model = save_weights(clip, name, tmp_path / "plain.pt")
    write({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "x.pt")
    tokens = clip.get_tokenizer("tiny-vit")(TEXTS)
    with torch.inference_mode():
        expected = model.encode_text(tokens).numpy()
    ours = text_features(TEXTS, model=name, weights=tmp_path / "x.pt", engine="torch")
    assert lowest_cosine(ours, expected) >= 0.9999
    options: dict[str, Any] = {"model": name, "engine": "torch"}
    images = [
        ImageVectorizer(**options, weights=tmp_path / file).extract_features(PNG)
        for file in ("x.pt", "plain.pt")
    ]
    assert cosine(*images) >= 0.9999


def test_files_beside_the_weights_say_how_to_use_them(clip, tmp_path):
    name = "open_clip/tiny-siglip"
    save_weights(clip, name, tmp_path / "weights.safetensors")
    options: dict[str, Any] = {
        "model": name,
        "weights": tmp_path / "weights.safetensors",
        "engine": "torch",
    }
    before: Any = ImageVectorizer(**options).spec.preprocessing
    assert (before.squash, before.mean[0]) == (False, 0.48145466)
    own = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "resize_mode": "squash",
        "interpolation": "bilinear",
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": own}))
    after: Any = ImageVectorizer(**options).spec.preprocessing
    assert (after.squash, after.mean, after.interpolation) == (True, (0.5, 0.5, 0.5), "bilinear")
    theirs = find_source(name).text_source().preprocessing(None, str(options["weights"]))
    write_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace('"single": [', '"single":  [')
    (tmp_path / "tokenizer.json").write_text(text)
    beside = find_source(name).text_source().preprocessing(None, str(options["weights"]))
    assert beside == theirs  # the same tokenizer, read from another place


def test_weights_of_another_model(clip, tmp_path):
    save_weights(clip, "open_clip/tiny-resnet", tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"do not fit 'open_clip/tiny-vit': .*visual"):
        text_features(["a"], model="open_clip/tiny-vit", weights=tmp_path / "weights.pt")


def test_weights_of_another_width(clip, tmp_path):
    model = save_weights(clip, "open_clip/tiny-vit", tmp_path / "plain.pt")
    wider = {
        key: torch.cat([value, value]) if value.ndim else value
        for key, value in model.state_dict().items()
    }
    wider["positional_embedding"] = torch.ones(70, 96)
    torch.save(wider, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"do not fit 'open_clip/tiny-vit': weights.pt cannot"):
        text_features(["a"], model="open_clip/tiny-vit", weights=tmp_path / "weights.pt")


def test_weights_that_end_early(clip, tmp_path):
    path = tmp_path / "weights.pt"
    save_weights(clip, "open_clip/tiny-vit", path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(
        WeightsError, match="weights.pt is not a weights file: it is damaged or ends"
    ):
        text_features(["a"], model="open_clip/tiny-vit", weights=path)


def test_a_configuration_beside_the_weights_that_is_damaged(clip, tmp_path):
    save_weights(clip, "open_clip/tiny-vit", tmp_path / "weights.pt")
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(WeightsError, match="open_clip_config.json is not valid JSON"):
        ImageVectorizer(model="open_clip/tiny-vit", weights=tmp_path / "weights.pt")


def test_weights_that_are_no_tensors_are_not_unpickled(clip, tmp_path):
    torch.save({"state_dict": shutil.rmtree}, tmp_path / "weights.pt")  # by its name, as code
    with pytest.raises(WeightsError, match=r"it contains Python objects \(shutil.rmtree\)"):
        text_features(["a"], model="open_clip/tiny-vit", weights=tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "open_clip/ViT-B32"}, "is not known: did you mean 'open_clip/ViT-B-32'"),
        ({"model": "open_clip/hf_hub:org/model"}, "'open_clip/hf_hub:org/model' is not known"),
        ({"model": "resnet50"}, "model='resnet50' cannot encode text: use an open_clip model"),
        ({"model": "timm/vit_tiny_patch16_224"}, "cannot encode text: use an open_clip model"),
        ({"weights": "laion2b_s34b_b79"}, "did you mean 'laion2b_s34b_b79k'"),
        ({"weights": "DEFAULT"}, "choose one of laion2b_e16, laion2b_s34b_b79k, datacomp_xl"),
        ({"weights": "openai"}, "trained with QuickGELU: use model='open_clip/ViT-B-32-quickgelu'"),
        ({"model": "open_clip/ViT-e-14", "weights": "laion"}, "open_clip has none; or use a path"),
        ({"weights": "missing.pt"}, "no such file"),
        ({"precision": "int8"}, "precision='int8' needs a saved model"),
        ({"max_pixels": 3}, "the option 'max_pixels' is not known"),
        ({"layer": "logits"}, "the option 'layer' is not known"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(clip, options, message):
    with pytest.raises((OptionError, WeightsError), match=message):
        text_features(["a"], **{"model": "open_clip/ViT-B-32", "weights": "random", **options})


def test_a_layer_of_the_image_tower(clip):
    with pytest.raises(OptionError, match="only support 'pooled'"):
        ImageVectorizer(model="open_clip/tiny-vit", weights="random", layer="logits")


def test_without_a_network_it_says_what_to_fetch(clip, monkeypatch):
    with pytest.raises(WeightsError, match=r"download timm/ViT-B-16-SigLIP on .*weights='<folder>"):
        ImageVectorizer(model="open_clip/ViT-B-16-SigLIP")
    with pytest.raises(WeightsError, match="put its tokenizer.json and tokenizer_config.json"):
        find_source("open_clip/ViT-B-16-SigLIP").text_source().preprocessing(None)


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"open_clip is not installed: .*imagevec\[clip\]"):
        ImageVectorizer(model="open_clip/ViT-B-32")
    assert module.names("vit") == []


def test_names(clip):
    assert "open_clip/ViT-B-32" in module.names("vit-b")
    assert not any(name.startswith("open_clip/") for name in list_models())
    with pytest.raises(OptionError, match="is taken"):
        register_model("open_clip/mine", Tiny)


def test_texts_must_be_strings(clip):
    options: dict[str, Any] = {"model": "open_clip/tiny-vit", "weights": "random"}
    with pytest.raises(OptionError, match="use a list of strings"):
        text_features("a", **options)
    with pytest.raises(OptionError, match=r"texts\[1\] is None"):
        text_features(["a", None], **options)  # type: ignore[list-item]
    with pytest.raises(OptionError, match="values of type int"):
        text_features([1], **options)  # type: ignore[list-item]
    assert text_features([], **options).shape == (0, 32)


def test_it_is_quantized_and_exported_like_others(clip, tmp_path):
    name = "open_clip/tiny-vit"
    images = [encode(photo(64, 64, seed=seed)) for seed in range(20)]
    report = quantize(
        images, model=name, weights="random", output=tmp_path / "int8", min_median_cosine=0.9
    )
    assert report.held_out_images == 4
    exact = ImageVectorizer(model=name, weights="random")
    int8 = ImageVectorizer(model=tmp_path / "int8")
    assert int8.spec.model == name
    assert cosine(int8.extract_features(PNG), exact.extract_features(PNG)) >= 0.9
    preprocessing = find_source(name).preprocessing(None)
    tower = find_source(name).module(preprocessing, None).eval()
    example = (torch.zeros(2, 3, 64, 64),)
    program = torch.export.export(tower, example, dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, tmp_path / "tower.pt2")
    register_model("tower", tmp_path / "tower.pt2", preprocessing=preprocessing)
    assert (
        cosine(ImageVectorizer(model="tower").extract_features(PNG), exact.extract_features(PNG))
        >= 0.9999
    )

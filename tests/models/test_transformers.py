"""Folders of transformers against ``AutoModel`` and ``AutoImageProcessor`` themselves."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagevec import (
    ImageVectorizer,
    MissingExtraError,
    OptionError,
    WeightsError,
    cache,
    quantize,
    text_features,
)
from imagevec.engines.torch_engine import normalize
from imagevec.images.preprocess import resize_and_crop
from imagevec.models.registry import check_is_name, find_source, named
from imagevec.plan import make_plan
from imagevec.runtime import get_engine
from imagevec.search.similar import similar
from tests.helpers.folders import IMAGE_MODELS, SIDE, write, write_tokenizer
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import decoded
from tests.helpers.tables import write_made_of

transformers = pytest.importorskip("transformers")

SIZES = [(120, 91), (77, 133), (64, 64), (33, 200), (301, 302), (45, 46), (500, 375)]
PHOTOS = [photo(*SIZES[seed % len(SIZES)], seed=seed) for seed in range(20)]
FILES = [encode(image) for image in PHOTOS]
TEXTS = ["a red shoe", "", "Grüße 🐱 of a small dog!", "word " * 100, "dress", " A  Photo, of\tit."]
LENGTH = 16  # of the context of text encoders, in tokens

ONLY_TORCH = {"align", "efficientnet"}  # OpenVINO has no pooling wider than its input
WITH_TEXTS = ["align", "altclip", "blip", "chinese-clip", "clip", "metaclip2", "siglip"]

# The vector of a layer by hand, from AutoModel's output, where it is not the pooler's.
CLASS_TOKEN = {"vit-classifier", "vit-masked", "deit-classifier", "deit-teacher", "pvt", "vit-msn"}
CLASS_TOKEN |= {"data2vec-vision"}
MEAN = {"ijepa"}
# With random weights, they make a difference of 1 in a pixel a hundred times larger.
CHAOTIC = {"levit", "mobilenet-v1", "mobilenet-v2"}
MAPS = {"poolformer", "pvt-v2", "swiftformer", "segformer"}


# One of each kind is always tested, the others by make test-models.
OFTEN = """vit vit-classifier deit-classifier dinov2 dinov2-larger dinov2-registers dinov3
    dinov3-convnext clip clip-classifier clip-vision-projection siglip convnextv2 convnextv2-large
    swin beit resnet hiera mobilevit ijepa segformer cvt align"""
RARELY = [pytest.mark.all_models, pytest.mark.models]
NAMES = [
    name if name in OFTEN.split() else pytest.param(name, marks=RARELY) for name in IMAGE_MODELS
]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that writes a folder on first use."""
    root = tmp_path_factory.mktemp("transformers")
    transformers.utils.logging.disable_progress_bar()

    def written(name: str) -> Path:
        folder: Path = root / name
        if not folder.exists():
            write(name, folder)
            if name in WITH_TEXTS:
                kind = json.loads((folder / "config.json").read_text())["model_type"]
                write_tokenizer(kind, folder, LENGTH)
        return folder

    return written


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def auto_model(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def pixels_of(folder: Path, images: Any = PHOTOS, **options: Any) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return torch.cat([processor(x, return_tensors="pt", **options)["pixel_values"] for x in images])


def our_pixels(folder: Path, images: Any, **options: Any) -> torch.Tensor:
    how: Any = make_plan(model=folder, **options).spec.preprocessing
    pixels = np.stack([resize_and_crop(np.array(image), how) for image in images])
    return normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), how)


def expected(name: str, folder: Path) -> np.ndarray:
    """The vectors ``(N, D)`` of ``PHOTOS``, computed by transformers."""
    model = auto_model(folder)
    pixels = our_pixels(folder, PHOTOS) if name in CHAOTIC else pixels_of(folder)
    with torch.inference_mode():
        if name == "clip-vision-projection":
            kind = transformers.CLIPVisionModelWithProjection
            return kind.from_pretrained(folder).eval()(pixels).image_embeds.numpy()
        if name == "clip-classifier":  # whose projection is random
            return model.vision_model(pixels).pooler_output.numpy()
        encode = getattr(model, "get_image_features", model)
        output = encode(pixels)
        if name in CLASS_TOKEN:
            vectors = output.last_hidden_state[:, 0]
        elif name in MEAN:
            vectors = output.last_hidden_state.mean(1)
        elif name in MAPS:
            vectors = output.last_hidden_state.mean((2, 3))
        elif name == "cvt":
            vectors = output.cls_token_value[:, 0]
        else:
            vectors = output.pooler_output
    return vectors.flatten(1).numpy()


def vectors_of(files: list[bytes], counts: tuple[int, ...], **options: Any) -> np.ndarray:
    """Computes vectors with batches of these sizes, in turn."""
    plan = make_plan(**options)
    engine = get_engine(plan, cache.stored, "cpu", 1)
    how: Any = plan.spec.preprocessing
    pixels = np.stack([resize_and_crop(decoded(file).pixels, how) for file in files])
    found, start = [], 0
    for batch in range(len(files)):
        end = min(start + counts[batch % len(counts)], len(files))
        found.append(engine(np.ascontiguousarray(pixels[start:end])))
        start = end
        if start == len(files):
            break
    return np.concatenate(found)


@pytest.mark.parametrize("name", NAMES)
def test_images_have_the_vectors_of_auto_model(folder_of, name):
    folder = folder_of(name)
    wanted = expected(name, folder)
    others = cosine(wanted[1:], wanted[:-1])
    assert others.min() < 0.9999  # else a constant would be near
    for engine in ("torch", "openvino"):
        if engine == "openvino" and name in ONLY_TORCH:
            with pytest.raises(OptionError, match="openvino cannot convert"):
                make_plan(model=folder, engine=engine)
            continue
        ours = vectors_of(FILES, (1, 2, 3, 8, 6), model=folder, engine=engine)
        assert ours.shape == wanted.shape
        assert cosine(ours, wanted).min() >= 0.9999, engine
        np.testing.assert_allclose(
            np.linalg.norm(ours, axis=1), np.linalg.norm(wanted, axis=1), rtol=0.05
        )


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_texts_have_the_vectors_of_auto_model(folder_of, name):
    folder = folder_of(name)
    model = auto_model(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    how = {"padding": "max_length" if name == "siglip" else True}
    tokens = tokenizer(TEXTS, truncation=True, max_length=LENGTH, return_tensors="pt", **how)
    tokens.pop("token_type_ids", None)
    with torch.inference_mode():
        wanted = model.get_text_features(**tokens).pooler_output.numpy()
    for engine in ("torch", "openvino"):
        ours = text_features(TEXTS, model=str(folder), engine=engine, batch_size=4)
        assert cosine(ours, wanted).min() >= 0.9999, engine
    text = make_plan(model=folder, texts=True).spec
    assert text.weights == make_plan(model=folder, engine="torch").spec.weights


def test_siglip_attends_to_padding_unless_its_tokenizer_has_a_mask(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("siglip"), tmp_path / "masked")
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        wanted = auto_model(folder).get_text_features(**tokens).pooler_output.numpy()
    ours = text_features(TEXTS, model=str(folder), engine="torch")
    assert cosine(ours, wanted).min() >= 0.9999
    unmasked = text_features(TEXTS, model=folder_of("siglip"), engine="torch")
    assert cosine(ours, unmasked).min() < 0.999


@pytest.mark.parametrize(
    ("name", "layer", "select"),
    [
        ("vit", "pooler", lambda x: x.pooler_output),
        ("vit", "cls", lambda x: x.last_hidden_state[:, 0]),
        ("vit", "mean", lambda x: x.last_hidden_state[:, 1:].mean(1)),
        ("deit-classifier", "mean", lambda x: x.last_hidden_state[:, 2:].mean(1)),
        ("dinov2-registers", "mean", lambda x: x.last_hidden_state[:, 3:].mean(1)),
        ("dinov3", "mean", lambda x: x.last_hidden_state[:, 3:].mean(1)),
        ("dinov3-convnext", "mean", lambda x: x.last_hidden_state[:, 1:].mean(1)),
        ("swin", "mean", lambda x: x.last_hidden_state.mean(1)),
        ("resnet", "mean", lambda x: x.last_hidden_state.mean((2, 3))),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_layers(folder_of, name, layer, select):
    folder = folder_of(name)
    with torch.inference_mode():
        wanted = select(auto_model(folder)(pixels_of(folder, PHOTOS[:3]))).numpy()
    ours = vectors_of(FILES[:3], (3,), model=folder, layer=layer, engine="torch")
    assert cosine(ours, wanted).min() >= 0.9999


@pytest.mark.parametrize("layer", ["pooler", "cls", "mean"])
def test_layers_of_a_dual_encoder_are_before_the_projection(folder_of, layer):
    folder = folder_of("clip")
    with torch.inference_mode():
        output = auto_model(folder).vision_model(pixels_of(folder, PHOTOS[:3]))
    hidden = output.last_hidden_state
    wanted = {"pooler": output.pooler_output, "cls": hidden[:, 0], "mean": hidden[:, 1:].mean(1)}
    ours = vectors_of(FILES[:3], (3,), model=folder, layer=layer, engine="torch")
    assert cosine(ours, wanted[layer].numpy()).min() >= 0.9999


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_several_layers_are_normalized_separately(folder_of, engine):
    options = {"model": folder_of("clip"), "engine": engine}
    layers = ("pooled", "mean", "pooler")
    ours = vectors_of(FILES[:3], (3,), layer=layers, normalize=True, **options)
    assert make_plan(layer=layers, **options).spec.layer_sizes == {
        "pooled": 24,
        "mean": 32,
        "pooler": 32,
    }
    single = [vectors_of(FILES[:3], (3,), layer=x, normalize=True, **options) for x in layers]
    np.testing.assert_allclose(ours, np.concatenate(single, axis=1), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["vit-classifier", "deit-teacher", "convnextv2-large", "siglip-classifier"]
)
def test_logits(folder_of, name):
    folder = folder_of(name)
    model = getattr(transformers, IMAGE_MODELS[name].model).from_pretrained(folder).eval()
    with torch.inference_mode():
        wanted = model(pixels_of(folder, PHOTOS[:3])).logits.numpy()
    ours = vectors_of(FILES[:3], (1, 2), model=folder, layer="logits")
    np.testing.assert_allclose(ours, wanted, atol=0.02)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("vit-classifier", "pooler", "'pooler' is not available .* 'pooled', 'cls', 'mean', 'log"),
        ("vit", "logits", "'logits' is not available .*, which has 'pooled', 'pooler', 'cls', 'me"),
        ("swin", "cls", "'cls' is not available .*, which has 'pooled', 'pooler', 'mean'"),
        ("vit", "layer3", "layer='layer3' is not valid .*: did you mean 'pooler'"),
        ("vit-classifier", ("pooled", "logits"), "takes 'logits' alone"),
        ("clip-classifier", "projection", "layer='projection' is not valid"),
    ],
    ids=str,
)
def test_layers_that_do_not_exist(folder_of, name, layer, message):
    with pytest.raises(OptionError, match=message):
        make_plan(model=folder_of(name), layer=layer)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "dinov3", "beit", "convnextv2", "swin"])
def test_input_size(folder_of, name, engine):
    folder = folder_of(name)
    ours = vectors_of(FILES[:3], (3,), model=folder, input_size=(48, 64), engine=engine)
    model = auto_model(folder)
    inputs = our_pixels(folder, PHOTOS[:3], input_size=(48, 64))
    assert inputs.shape == (3, 3, 48, 64)
    encode = getattr(model, "get_image_features", model)
    options = {"interpolate_pos_encoding": True} if name in ("vit", "clip", "beit") else {}
    with torch.inference_mode():
        wanted = encode(inputs, **options).pooler_output.numpy()
    assert cosine(ours, wanted).min() >= 0.9999


def test_an_input_size_that_the_model_does_not_take(folder_of):
    with pytest.raises(OptionError, match="cannot take images of 45x45"):
        make_plan(model=folder_of("aimv2-vision"), input_size=45)


@pytest.mark.parametrize("form", ["shards", "float16", "bfloat16"])
def test_other_forms_of_weights(folder_of, tmp_path, form):
    folder = shutil.copytree(folder_of("vit"), tmp_path / form)
    model = auto_model(folder)
    (folder / "model.safetensors").unlink()
    if form == "shards":
        model.save_pretrained(folder, max_shard_size="20KB")
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        shards[-1].rename(tmp_path / "shard")
        with pytest.raises(WeightsError, match=f"{shards[-1].name}.*: no such file"):
            make_plan(model=folder)
        (tmp_path / "shard").rename(shards[-1])
    else:
        model.to(getattr(torch, form)).save_pretrained(folder)
    wanted = expected("vit", folder)
    for engine in ("torch", "openvino"):
        ours = vectors_of(FILES, (8,), model=folder, engine=engine)
        assert cosine(ours, wanted).min() >= 0.9999


@pytest.mark.parametrize("precision", ["bfloat16"])
@pytest.mark.parametrize("name", ["vit", "clip", "dinov3", "swin"])
def test_lower_precisions_are_near(folder_of, name, precision):
    options = {"model": folder_of(name), "engine": "torch"}
    exact = vectors_of(FILES, (8,), **options)
    assert cosine(vectors_of(FILES, (8,), precision=precision, **options), exact).min() >= 0.99


def test_weights_are_identified_by_their_content_and_configuration(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("vit"), tmp_path / "vit")
    same = make_plan(model=folder).spec
    assert same == make_plan(model=folder_of("vit")).spec
    assert same.model == "transformers:vit"
    assert same.weights.startswith("sha256:")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"gelu"', '"relu"'))
    changed = make_plan(model=folder).spec
    assert changed.weights != same.weights
    assert changed.fingerprint != same.fingerprint
    wanted = expected("vit", folder)
    assert cosine(vectors_of(FILES, (8,), model=folder), wanted).min() >= 0.9999
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"resample": 2', '"resample": 3'))
    preprocessing: Any = make_plan(model=folder).spec.preprocessing
    assert preprocessing.interpolation == "bicubic"


def test_random_weights_are_the_same_everywhere(folder_of, tmp_path):
    folder = tmp_path / "vit"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folder_of("vit") / name, folder)
    spec = make_plan(model=folder, weights="random").spec
    assert spec == make_plan(model=folder_of("vit"), weights="random").spec
    with pytest.raises(WeightsError, match="has no weights: model.safetensors"):
        make_plan(model=folder)


_WORKER = """
import pickle, sys, numpy as np
from imagevec import cache
from imagevec.runtime import get_engine, get_tokenizer
plan, inputs = pickle.load(sys.stdin.buffer)
if isinstance(inputs, list):
    tokenizer = get_tokenizer(plan, cache.stored)
    inputs = tokenizer.stack([tokenizer(text) for text in inputs])
vectors = get_engine(plan, cache.stored, "cpu", 1)(inputs)
libraries = {"torch", "transformers", "huggingface_hub", "safetensors"} & sys.modules.keys()
sys.stdout.buffer.write(pickle.dumps((vectors, libraries)))
"""


def on_worker(plan: Any, inputs: Any) -> Any:
    """Runs an engine in another process, which has only the plan and the cache."""
    command = [sys.executable, "-c", _WORKER]
    done = subprocess.run(command, input=pickle.dumps((plan, inputs)), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_workers_do_not_have_the_folder(folder_of, tmp_path, engine):
    folder = shutil.copytree(folder_of("clip"), tmp_path / "clip")
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    plans = [make_plan(model=folder, texts=texts, engine=engine) for texts in (False, True)]
    here = text_features(TEXTS, model=folder, engine=engine)
    shutil.rmtree(folder)
    for plan in plans:
        assert len(pickle.dumps(plan)) < 4000
    images, libraries = on_worker(plans[0], pixels)
    texts, libraries_of_texts = on_worker(plans[1], TEXTS)
    assert images.shape == (3, 24)
    assert cosine(texts, here).min() >= 0.99999
    if engine == "openvino":
        assert libraries == libraries_of_texts == set()


def hub_cache(monkeypatch: Any, tmp_path: Path, folder: Path, commit: str) -> None:
    """Puts a folder in the hub's cache as the newest revision of a repository."""
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_names_of_the_hub(folder_of, tmp_path, monkeypatch):
    old, new = "1" * 40, "2" * 40
    hub_cache(monkeypatch, tmp_path, folder_of("vit"), old)
    hub_cache(monkeypatch, tmp_path, folder_of("dinov2"), new)
    name = "transformers/owner/name"
    spec = make_plan(model=name).spec
    assert spec.model == f"{name}@{new}"
    assert find_source(name).has_weights()
    earlier = make_plan(model=f"{name}@{old}").spec
    assert earlier.model == f"{name}@{old}"
    assert earlier.fingerprint != spec.fingerprint
    assert earlier.weights == make_plan(model=folder_of("vit")).spec.weights
    wanted = expected("dinov2", folder_of("dinov2"))
    assert cosine(vectors_of(FILES, (8,), model=name), wanted).min() >= 0.9999
    options, files = find_source(name).to_save("DEFAULT", lambda: None)
    assert (options, files) == ({"model": f"{name}@{new}"}, {})
    assert named(spec.model, "float32", "table") == spec.model  # a table's provenance names it


def test_queries_of_a_table_made_with_a_name_of_the_hub(folder_of, tmp_path, monkeypatch):
    hub_cache(monkeypatch, tmp_path, folder_of("clip"), "1" * 40)
    vectorizer = ImageVectorizer(model="transformers/owner/name", layer="cls")
    rows = {f"file:/{seed}.png": vectorizer.extract_features(FILES[seed]) for seed in range(3)}
    write_made_of(tmp_path / "table", rows, vectorizer.spec.metadata)
    (tmp_path / "query.png").write_bytes(FILES[1])
    (found,) = similar(str(tmp_path / "table"), [str(tmp_path / "query.png")], 1)
    assert [x["path"] for x in found["neighbours"]] == ["file:/1.png"]
    assert found["neighbours"][0]["cosine"] >= 0.9999


def test_without_a_network_it_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        WeightsError, match=r"cannot download owner/name .* or in HF_HOME\. Without"
    ):
        make_plan(model="transformers/owner/name")
    assert not find_source("transformers/owner/name@abc").has_weights()
    with pytest.raises(WeightsError, match="cannot download owner/na--me"):
        make_plan(model="transformers/owner/na--me")  # not a valid name
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"imagevec\[transformers\]"):
        make_plan(model="transformers/owner/name")


def test_names_from_data_are_no_folders(folder_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_is_name("transformers/owner/name", "pipeline")
    check_is_name("transformers/owner/name@" + "1" * 40, "pipeline")
    shutil.copytree(folder_of("vit"), tmp_path / "owner" / "name")
    for name in (
        "transformers/owner/name",
        "owner/name",
        "transformers/../owner/name",
        f"transformers/{tmp_path}/owner/name",
        "transformers/~/x",
        "transformers/vit",
        "transformers/owner/name@a/../../b",
    ):
        with pytest.raises(OptionError, match="is not a name"):
            check_is_name(name, "pipeline")
    with pytest.raises(OptionError, match="a file or folder: give it as --model"):
        named("transformers:vit", "float32", "table")


def test_a_featurizer_with_a_folder_is_not_saved(folder_of):
    with pytest.raises(OptionError, match="cannot be saved, because it reads that folder"):
        find_source(folder_of("vit")).to_save("DEFAULT", lambda: None)


def test_a_folder_is_named_with_and_without_the_prefix(folder_of, monkeypatch):
    folder = folder_of("vit")
    monkeypatch.chdir(folder.parent)
    specs = {make_plan(model=model).spec for model in (folder, str(folder), "vit", "./vit")}
    specs |= {make_plan(model=f"transformers/{model}").spec for model in (folder, "vit", "./vit/")}
    assert len(specs) == 1


def edited(folder: Path, to: Path, file: str = "config.json", **changes: Any) -> Path:
    """Copies a folder with other values in a JSON file; ``None`` removes one."""
    shutil.copytree(folder, to)
    content = {**json.loads((to / file).read_text()), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (to / file).write_text(json.dumps(content))
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_map": {"AutoModel": "modeling_evil.Evil"}},
            r"needs the code in its folder \(auto_map of config.json: modeling_evil.Evil\)",
        ),
        ({"auto_map": "modeling_evil.Evil"}, r"\(auto_map of config.json: modeling_evil.Evil\)"),
        ({"quantization_config": {"load_in_8bit": True}}, "has quantized weights"),
        ({"model_type": ["vit"]}, r"has model_type=\['vit'\], which is not supported"),
        ({"model_type": "llava"}, "has model_type='llava', which is not supported: use a model"),
        ({"model_type": "detr"}, "has model_type='detr', which is not supported"),
        ({"model_type": "videomae"}, "has model_type='videomae', which is not supported"),
        ({"model_type": "vit_mae"}, r"model_type='vit_mae'\) masks patches at random: save it"),
        (
            {"model_type": "siglip2"},
            "keeps the aspect ratio of images .NaFlex.: use one of a fixed",
        ),
        ({"model_type": None, "architecture": "resnet18"}, "use model='timm/local-dir:<folder>'"),
        ({"model_type": None}, "config.json has no model_type"),
        ({"hidden_act": "unknown"}, "transformers cannot build a 'vit' from this config.json: "),
        ({"hidden_size": "many"}, "transformers cannot build a 'vit' from this config.json: "),
        ({"hidden_size": 64}, "do not fit 'transformers:edited': .* has the shape"),
        ({"num_hidden_layers": 3}, "do not fit .*: 16 tensors of the model are not in its files"),
        (
            {"num_hidden_layers": 1},
            r"do not fit .*: by config.json, the model lacks .*\.1\..* of its",
        ),
        ({"image_size": 64}, "position_embeddings has the shape"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(folder_of, tmp_path, changes, message):
    folder = edited(folder_of("vit"), tmp_path / "edited", **changes)
    with pytest.raises((OptionError, WeightsError), match=message):
        make_plan(model=folder)


def test_code_and_quantization_may_be_null(folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of("vit"), tmp_path / "vit"))
    content = json.loads((folder / "config.json").read_text())
    content |= {"auto_map": None, "quantization_config": None}
    (folder / "config.json").write_text(json.dumps(content))
    vectors = vectors_of(FILES, (8,), model=folder)
    assert cosine(vectors, expected("vit", folder_of("vit"))).min() >= 0.9999


def test_configurations_do_not_choose_code(folder_of, tmp_path):
    # attn_implementation may name a repository whose kernels transformers downloads and runs.
    evil: dict[str, Any] = {
        "attn_implementation": "owner/kernels",
        "_attn_implementation": "owner/kernels",
    }
    evil |= {"dtype": "float16", "return_dict": False, "architectures": ["AutoModel"]}
    folder = edited(folder_of("vit"), tmp_path / "edited", **evil)
    wanted = expected("vit", folder_of("vit"))
    assert cosine(vectors_of(FILES, (8,), model=folder), wanted).min() >= 0.9999


def test_files_that_are_missing_or_damaged(folder_of, tmp_path):
    def folder(name: str) -> Path:
        shutil.rmtree(tmp_path / "vit", ignore_errors=True)
        copy = shutil.copytree(folder_of("vit"), tmp_path / "vit")
        (copy / name).unlink()
        return copy

    with pytest.raises(WeightsError, match="has no preprocessor_config.json, .*: copy the one"):
        make_plan(model=folder("preprocessor_config.json"))
    pickled = folder("model.safetensors")
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pickled weights \(pytorch_model.bin\), .*: convert"):
        make_plan(model=pickled)
    (folder("model.safetensors") / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="contains an adapter"):
        make_plan(model=tmp_path / "vit")
    pointer = folder("model.safetensors") / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(WeightsError, match="is a Git LFS pointer"):
        make_plan(model=tmp_path / "vit")
    cut = (folder("config.json") / "model.safetensors", folder_of("vit") / "config.json")
    shutil.copy(cut[1], tmp_path / "vit")
    cut[0].write_bytes(cut[0].read_bytes()[:-100])
    with pytest.raises(WeightsError, match="model.safetensors is damaged or ends early"):
        make_plan(model=tmp_path / "vit")
    (folder("config.json") / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json is not valid JSON"):
        make_plan(model=tmp_path / "vit")
    with pytest.raises(OptionError, match="is not a saved model, .* or a folder of transformers"):
        make_plan(model=folder("config.json"))
    with pytest.raises(OptionError, match="has no config.json"):
        make_plan(model=f"transformers/{tmp_path / 'vit'}")
    with pytest.raises(OptionError, match="no such folder; a repository of the hub"):
        make_plan(model="transformers/vit-that-does-not-exist")


def test_flipped_channels_are_refused_by_name(folder_of, tmp_path):
    file = "preprocessor_config.json"
    folder = edited(folder_of("mobilevit"), tmp_path / "m", file, do_flip_channel_order=True)
    with pytest.raises(OptionError, match="MobileViTImageProcessor is not supported: it flips"):
        make_plan(model=folder)


def test_an_old_processor_without_its_name(folder_of, tmp_path):
    file = "preprocessor_config.json"
    folder = edited(folder_of("clip"), tmp_path / "c", file, image_processor_type=None)
    ours = vectors_of(FILES, (8,), model=folder)
    assert cosine(ours, expected("clip", folder_of("clip"))).min() >= 0.9999


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", "cannot encode text: it only has an image encoder"),
        ("clip-vision", "cannot encode text: it only has an image encoder"),
        ("siglip-classifier", "tokenizer"),
    ],
)
def test_folders_without_a_text_encoder(folder_of, name, message):
    with pytest.raises((OptionError, WeightsError), match=message):
        text_features(["a"], model=str(folder_of(name)))


def test_a_tokenizer_of_another_model(folder_of, tmp_path):
    folder = edited(folder_of("clip"), tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 150
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="has tokens up to 199, its text encoder 150 tokens"):
        text_features(["a"], model=str(folder), weights="random")
    with pytest.raises(WeightsError, match="has no tokenizer: put its tokenizer.json"):
        for path in folder.glob("*token*"):
            path.unlink()
        text_features(["a"], model=str(folder))


def test_a_tokenizer_whose_class_needs_sentencepiece(folder_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    wanted = text_features(TEXTS, model=str(folder_of("siglip")), engine="torch")
    file = "tokenizer_config.json"
    folder = edited(folder_of("siglip"), tmp_path / "s", file, tokenizer_class="SiglipTokenizer")
    ours = text_features(TEXTS, model=str(folder), engine="torch")
    np.testing.assert_array_equal(ours, wanted)
    (folder / "tokenizer.json").unlink()  # the plan is not the earlier one
    with pytest.raises(WeightsError, match="put its tokenizer.json and tokenizer_config.json"):
        text_features(TEXTS, model=str(folder), engine="torch")


def test_other_options_are_refused(folder_of):
    folder = folder_of("vit")
    with pytest.raises(OptionError, match="contains weights; for others, use a folder"):
        make_plan(model=folder, weights="vit.safetensors")
    with pytest.raises(OptionError, match="precision='int8' needs a saved model"):
        make_plan(model=folder, precision="int8")


def test_without_transformers(folder_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"imagevec\[transformers\]"):
        make_plan(model=folder_of("vit"), normalize=True, layer="cls")


def test_it_is_quantized_like_others(folder_of, tmp_path):
    pytest.importorskip("nncf")
    folder = folder_of("resnet")
    quantize(FILES, model=folder, output=tmp_path / "int8", min_median_cosine=0.5)
    ours = ImageVectorizer(model=tmp_path / "int8")
    assert ours.spec.model == "transformers:resnet"
    exact = ImageVectorizer(model=folder)
    assert cosine(ours.extract_features(FILES[0]), exact.extract_features(FILES[0])) >= 0.9

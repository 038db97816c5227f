"""Models of timm and open_clip in folders and on the Hugging Face hub, against the libraries."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagevec import (
    ImageFeaturizer,
    ImageVectorizer,
    MissingExtraError,
    OptionError,
    WeightsError,
    cache,
    text_features,
)
from imagevec.models import hub
from imagevec.models.registry import check_is_name, find_source, named
from imagevec.plan import make_plan
from imagevec.runtime import get_engine
from tests.helpers.clip import SENTENCES, write_tokenizer
from tests.helpers.images import cosine, encode, photo
from tests.helpers.repositories import BERT_TEXT, DATA, edit, readable, write_clip, write_timm

timm = pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")

IMAGE = photo(50, 41)
PNG = encode(IMAGE)
COMMIT = "0123456789" * 4


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    hub._downloaded.cache_clear()
    return folder


def to_hub(folder: Path, hub_cache: Path, name: str = "someone/model") -> None:
    """Copies a folder to the hub's cache, as a download would."""
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize(("library", "extra"), [("timm", "timm"), ("open_clip", "clip")])
def test_without_the_client_of_the_hub_the_extra_of_the_library_is_named(
    hub_cache, monkeypatch, library, extra
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'imagevec\[{extra}\]'"):
        find_source(f"{library}/hf-hub:someone/model")


def expected_of_timm(folder: Path) -> Any:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        images = transform(IMAGE)[None]
        return model.forward_head(model.forward_features(images), pre_logits=True)[0].numpy()


@pytest.mark.filterwarnings("ignore:dropout2d")
@pytest.mark.parametrize(
    ("kind", "safe", "engine"),
    [("vit", True, "torch"), ("vit", False, "openvino"), ("resnet10t", True, "openvino")],
)
def test_timm_folder_is_timms_model(kind, safe, engine, tmp_path):
    folder = write_timm(tmp_path / "mine", kind, safe_serialization=safe)
    vectorizer: Any = ImageVectorizer(model=f"timm/local-dir:{folder}", engine=engine)
    assert vectorizer.spec.model == "timm:mine"
    assert vectorizer.spec.preprocessing.mean == DATA["mean"]
    assert cosine(vectorizer.extract_features(PNG), expected_of_timm(folder)) >= 0.9999
    logits: Any = ImageVectorizer(model=f"timm/local-dir:{folder}", engine=engine, layer="logits")
    assert logits.num_features == 5


def test_timm_repository_is_that_of_the_folder(hub_cache, tmp_path):
    folder = write_timm(tmp_path / "mine")
    to_hub(folder, hub_cache)
    local: Any = ImageVectorizer(model=f"timm/local-dir:{folder}")
    remote: Any = ImageVectorizer(model="timm/hf-hub:someone/model")
    assert remote.spec.model == "timm/hf-hub:someone/model"
    assert np.array_equal(remote.extract_features(PNG), local.extract_features(PNG))
    revision: Any = ImageVectorizer(model=f"timm/hf-hub:someone/model@{COMMIT}")
    assert revision.spec.model == f"timm/hf-hub:someone/model@{COMMIT}"


def test_timm_folder_at_another_size(tmp_path):
    folder = write_timm(tmp_path / "mine")
    size = (48, 64)
    vectorizer: Any = ImageVectorizer(model=f"timm/local-dir:{folder}", input_size=size)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size).eval()
    config = timm.data.resolve_data_config({"input_size": (3, *size)}, model.pretrained_cfg)
    images = timm.data.create_transform(**config)(IMAGE)[None]
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)[0]
    assert cosine(vectorizer.extract_features(PNG), expected) >= 0.9999


def test_timm_configuration_without_parts(tmp_path):
    """As older versions of timm wrote it, for example for models of 2022."""
    folder = write_timm(tmp_path / "old", "resnet10t")
    content = json.loads((folder / "config.json").read_text())
    legacy = {**content["pretrained_cfg"], "architecture": content["architecture"]}
    (folder / "config.json").write_text(json.dumps({**legacy, "labels": ["a"] * 5}))
    vectorizer: Any = ImageVectorizer(model=f"timm/local-dir:{folder}")
    assert cosine(vectorizer.extract_features(PNG), expected_of_timm(folder)) >= 0.9999


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_workers_do_not_need_the_folder(library, tmp_path):
    write = write_timm if library == "timm" else write_clip
    folder = write(tmp_path / "mine")
    plan = make_plan(model=f"{library}/local-dir:{folder}", engine="torch")
    pickled = cloudpickle.dumps(plan)
    assert len(pickled) < 10_000
    vector: Any = ImageVectorizer(model=f"{library}/local-dir:{folder}").extract_features(PNG)
    shutil.rmtree(folder)
    engine = get_engine(cloudpickle.loads(pickled), cache.stored, "cpu", threads=1)
    assert engine(np.zeros((2, *plan.spec.preprocessing.input_shape, 3), np.uint8)).shape == (
        2,
        len(vector),
    )


def test_another_configuration_is_another_model(tmp_path):
    model = f"timm/local-dir:{write_timm(tmp_path / 'mine')}"
    before = make_plan(model=model).spec
    assert before == make_plan(model=model).spec
    edit(tmp_path / "mine", model_args__act_layer="relu")
    after = make_plan(model=model).spec
    assert after.weights == before.weights
    assert after.fingerprint != before.fingerprint
    tensors = load_file(tmp_path / "mine" / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "mine" / "model.safetensors")
    assert make_plan(model=model).spec.weights != before.weights


def test_weights_from_a_file(tmp_path):
    folder = write_timm(tmp_path / "mine")
    weights = tmp_path / "other.safetensors"
    shutil.move(folder / "model.safetensors", weights)
    options: dict[str, Any] = {"model": f"timm/local-dir:{folder}"}
    with pytest.raises(WeightsError, match=f"{folder} does not contain model.safetensors or pyt"):
        make_plan(**options)
    spec = make_plan(**options, weights=weights).spec
    assert spec.weights.startswith("sha256:")
    assert make_plan(**options, weights="random").spec.weights == "random"
    with pytest.raises(OptionError, match="weights='a1_in1k' is not known for 'timm:mine'"):
        make_plan(**options, weights="a1_in1k")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"architecture": "vit_tiny_patch16"}, OptionError, "has no architecture .*did you mean"),
        ({"architecture": None}, WeightsError, "is not timm's: it names no 'architecture'"),
        ({"model_args__checkpoint_path": "/etc/passwd"}, OptionError, "timm cannot build"),
        ({"model_args__pretrained": True}, OptionError, "timm cannot build"),
        ({"model_args__nonsense": 1}, OptionError, "timm cannot build 'timm:mine' from config"),
        ({"model_args__in_chans": 1}, OptionError, "takes 1 channels, not RGB images"),
        ({"model_args__embed_dim": 48}, WeightsError, "do not fit 'timm:mine'"),
    ],
    ids=str,
)
def test_other_timm_configurations_are_refused(values, error, message, tmp_path):
    folder = write_timm(tmp_path / "mine")
    edit(folder, **values)
    with pytest.raises(error, match=message):
        make_plan(model=f"timm/local-dir:{folder}")


@pytest.mark.parametrize("key", ["file", "url", "hf_hub_id"])
def test_other_places_of_weights_are_not_read(key, tmp_path):
    folder = write_timm(tmp_path / "mine")
    expected = make_plan(model=f"timm/local-dir:{folder}", input_size=64).spec
    edit(folder, **{f"pretrained_cfg__{key}": str(tmp_path / "elsewhere")})
    assert make_plan(model=f"timm/local-dir:{folder}", input_size=64).spec == expected


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("timm/local-dir:no/such", OptionError, "no such folder"),
        ("timm/local-dir:", OptionError, "no such folder"),
        ("timm/hf-hub:resnet18", OptionError, "use 'timm/hf-hub:<owner>/<name>'"),
        ("open_clip/hf-hub:../../x", OptionError, "use 'open_clip/hf-hub:<owner>/<name>'"),
        (
            "timm/hf-hub:nobody/nothing",
            WeightsError,
            "cannot fetch config.json of nobody/nothing .*Without a network, download config.json "
            "of nobody/nothing on another machine.*model='timm/local-dir:<folder>'",
        ),
        (
            "open_clip/hf-hub:nobody/nothing",
            WeightsError,
            "download open_clip_config.json of .*model='open_clip/local-dir:<folder>'",
        ),
    ],
)
def test_names_of_nothing(model, error, message, hub_cache):
    with pytest.raises(error, match=message):
        make_plan(model=model)


def test_without_a_network_the_weights_are_named(hub_cache, tmp_path):
    folder = write_timm(tmp_path / "mine")
    (folder / "model.safetensors").unlink()
    to_hub(folder, hub_cache)
    with pytest.raises(WeightsError, match="cannot fetch model.safetensors of .*download model.s"):
        make_plan(model="timm/hf-hub:someone/model")


def test_damaged_configuration(tmp_path):
    folder = write_timm(tmp_path / "mine")
    for content, message in (("{", "is not valid JSON"), ("[]", "contains no JSON object")):
        (folder / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=f"config.json is not valid.*|{message}"):
            make_plan(model=f"timm/local-dir:{folder}")


def test_names_from_data_are_repositories():
    for prefix in ("timm/", "open_clip/"):
        for name in ("hf-hub:someone/model", "hf-hub:someone/model.v1@refs"):
            check_is_name(prefix + name, "a table")
            assert named(prefix + name, "float32", "a table") == prefix + name
        for name in ("local-dir:/tmp", "local-dir:x", "hf-hub:x", "hf-hub:../x/y", "hf-hub:/etc/x"):
            with pytest.raises(OptionError, match="is not a name"):
                check_is_name(prefix + name, "a table")
    with pytest.raises(OptionError, match="'timm:mine', a file or folder: give it as --model"):
        named("timm:mine", "float32", "a table")


@pytest.mark.java
def test_pipelines_contain_names_of_repositories_only(spark, hub_cache, tmp_path):
    folder = write_timm(tmp_path / "mine")
    to_hub(folder, hub_cache)
    with pytest.raises(OptionError, match="the folder .*mine as model cannot be saved"):
        ImageFeaturizer(model=f"timm/local-dir:{folder}").save(str(tmp_path / "local"))
    ImageFeaturizer(model="timm/hf-hub:someone/model").save(str(tmp_path / "remote"))
    loaded = ImageFeaturizer.load(str(tmp_path / "remote"))
    assert loaded.getModel() == "timm/hf-hub:someone/model"


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("tiny-vit", "torch"),
        ("tiny-vit", "openvino"),
        ("tiny-siglip", "torch"),
        ("bert", "torch"),
        ("bert", "openvino"),
    ],
)
def test_open_clip_folder_is_open_clips_model(kind, engine, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path / "mine"
    if kind == "bert":
        write_clip(folder, text_cfg=BERT_TEXT)
    else:
        write_clip(folder, kind)
    where = f"local-dir:{readable(folder)}"
    model, _, transform = open_clip.create_model_and_transforms(where)
    tokens = open_clip.get_tokenizer(where)(SENTENCES)
    with torch.inference_mode():
        image = model.eval().encode_image(transform(IMAGE)[None])[0]
        texts = model.encode_text(tokens)
    options: dict[str, Any] = {"model": f"open_clip/local-dir:{folder}", "engine": engine}
    vectorizer: Any = ImageVectorizer(**options)
    assert vectorizer.spec.model == "open_clip:mine"
    assert vectorizer.spec.preprocessing.squash
    assert cosine(vectorizer.extract_features(PNG), image) >= 0.9999
    for ours, theirs in zip(text_features(SENTENCES, **options), texts, strict=True):
        assert cosine(ours, theirs) >= 0.9999


def test_open_clip_repository(hub_cache, tmp_path):
    folder = write_clip(tmp_path / "mine", text_cfg=BERT_TEXT)
    bert = tmp_path / "bert"
    bert.mkdir()
    shutil.move(folder / "config.json", bert)
    write_tokenizer(bert)
    to_hub(folder, hub_cache)
    with pytest.raises(WeightsError, match="is 'someone/bert' of transformers.*: put config.json"):
        make_plan(model="open_clip/hf-hub:someone/model")
    to_hub(bert, hub_cache, "someone/bert")
    shutil.copy(bert / "config.json", folder)
    local: dict[str, Any] = {"model": f"open_clip/local-dir:{folder}"}
    remote: dict[str, Any] = {"model": "open_clip/hf-hub:someone/model"}
    one: Any = ImageVectorizer(**local).extract_features(PNG)
    other: Any = ImageVectorizer(**remote).extract_features(PNG)
    assert np.array_equal(one, other)
    assert find_source(**remote).text_source().name == "open_clip/hf-hub:someone/model"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model_cfg": {}}, WeightsError, "is not open_clip's: it has no 'model_cfg'"),
        (
            {"model_cfg__vision_cfg__timm_model_name": "hf-hub:someone/else"},
            OptionError,
            "names paths .'hf-hub:someone/else'.",
        ),
        ({"model_cfg__text_cfg__hf_tokenizer_name": "/etc"}, OptionError, "names paths .'/etc'."),
        ({"model_cfg__text_cfg__hf_model_name": "../x"}, OptionError, "names paths"),
        ({"model_cfg__vision_cfg__nonsense": 1}, OptionError, "cannot build 'open_clip:mine'"),
        ({"model_cfg__embed_dim": 41}, WeightsError, "do not fit 'open_clip:mine'"),
    ],
    ids=str,
)
def test_other_open_clip_configurations_are_refused(values, error, message, tmp_path):
    folder = write_clip(tmp_path / "mine")
    edit(folder, "open_clip_config.json", **values)
    with pytest.raises(error, match=message):
        make_plan(model=f"open_clip/local-dir:{folder}")


def test_code_of_a_text_tower_is_refused(tmp_path):
    folder = write_clip(tmp_path / "mine", text_cfg=BERT_TEXT)
    edit(folder, auto_map={"AutoModel": "modeling.Model"})
    with pytest.raises(OptionError, match="it needs code that is not in transformers .auto_map."):
        make_plan(model=f"open_clip/local-dir:{folder}")


def test_tokenizer_of_the_folder_is_needed(tmp_path):
    folder = write_clip(tmp_path / "mine", "tiny-siglip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(WeightsError, match="tokenizer of open_clip:mine, someone/tokenizer"):
        text_features(SENTENCES, model=f"open_clip/local-dir:{folder}")

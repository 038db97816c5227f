from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import re
import shutil
import urllib.error
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import googlenet, mnasnet0_5, squeezenet1_1

from imagevec import ImageVectorizer, Preprocessing, WeightsError
from imagevec.models.factory import FactorySource
from imagevec.models.layers import to_feature_model
from imagevec.models.state_dict import check_loaded, with_weights
from imagevec.models.torchvision import TorchvisionSource
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, tiny, tiny_densenet, tiny_vit
from tests.helpers.images import cosine, encode, photo
from tests.helpers.pipeline import pixels_of, preprocess, run_python, saved, vector_of
from tests.models import forms

PNG = encode(photo())
SQUEEZENET: dict[str, Any] = {"model": "squeezenet1_1", "engine": "torch"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``.pth`` file of SqueezeNet."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    saved(squeezenet1_1, path)
    return path


@pytest.fixture(scope="module")
def state_dict(weights: Path) -> dict[str, torch.Tensor]:
    return torch.load(weights)


@pytest.fixture(scope="module")
def vector(weights: Path) -> list[float]:
    return vector_of(PNG, weights=str(weights), **SQUEEZENET)


def refused(path: Path, model: Any = "squeezenet1_1", **options: Any) -> str:
    with pytest.raises(WeightsError) as error:
        ImageVectorizer(model=model, weights=str(path), engine="torch", **options)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_the_format_of_the_file_does_not_matter(suffix, state_dict, vector, tmp_path):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state_dict, path)
    assert vector_of(PNG, weights=str(path), **SQUEEZENET) == vector


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights},
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        lambda weights: {"state_dict": {f"module.{name}": weights[name] for name in weights}},
        lambda weights: {name: nn.Parameter(value) for name, value in weights.items()},
    ],
    ids=["state_dict", "model", "module.", "both", "parameters"],
)
def test_a_training_checkpoint_is_opened(wrap, state_dict, vector, tmp_path):
    torch.save(wrap(state_dict), tmp_path / "checkpoint.pth")
    assert vector_of(PNG, weights=str(tmp_path / "checkpoint.pth"), **SQUEEZENET) == vector


def test_the_old_file_format_of_pytorch_is_read(state_dict, vector, tmp_path):
    torch.save(state_dict, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert vector_of(PNG, weights=str(tmp_path / "old.pth"), **SQUEEZENET) == vector


def test_densenets_old_names_are_read(tmp_path):
    state_dict = saved(tiny_densenet, tmp_path / "new.pth").state_dict()
    old = {re.sub(r"\.(norm|conv)([12])\.", r".\1.\2.", key): state_dict[key] for key in state_dict}
    assert old.keys() != state_dict.keys()
    torch.save(old, tmp_path / "old.pth")
    vectors = [
        vector_of(PNG, model=tiny_densenet, weights=str(tmp_path / name))
        for name in ("new.pth", "old.pth")
    ]
    assert vectors[0] == vectors[1]


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(obj)])
def test_code_in_a_file_is_refused_and_not_run(suffix, write, tmp_path):
    trap = Malicious(tmp_path / "code was run")
    payload = {"a": trap} if write is torch.save else pickle.dumps({"a": trap}, protocol=2)
    path = tmp_path / f"evil{suffix}"
    write(payload, path)
    assert f"evil{suffix} is not a weights file" in refused(path)
    assert not trap.folder.exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "code was run")))
    assert (tmp_path / "code was run").exists()


def test_a_pickle_that_pops_from_nothing_is_no_file_of_weights(tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"\x80\x02.")
    assert "is not a weights file" in refused(tmp_path / "damaged.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_no_file_of_weights(suffix, state_dict, tmp_path):
    small = {name: value for name, value in state_dict.items() if value.numel() < 2000}
    path = tmp_path / f"damaged{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(small, path)
    data = path.read_bytes()
    garbage = [np.random.default_rng(seed).bytes(300) for seed in range(5)]
    for cut in [*(data[: len(data) * part // 8] for part in range(8)), *garbage]:
        path.write_bytes(cut)
        assert "is not a weights file" in refused(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"epoch": 3, "state_dict": {"a": "b"}}, 7])
def test_a_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "something.pth")
    assert "is not a weights file" in refused(tmp_path / "something.pth")


def test_weights_of_another_model_are_refused_by_name(weights):
    message = refused(weights, model="resnet18")
    assert "do not fit 'resnet18'" in message
    assert "conv1.weight" in message


def test_a_classifier_of_another_size_is_not_needed(tmp_path):
    model: Any = saved(functools.partial(squeezenet1_1, num_classes=7), tmp_path / "seven.pth")
    image = preprocess(pixels_of(photo()), Preprocessing())[None]
    with torch.inference_mode():
        expected = model.features(image).mean((2, 3))[0]
    vector = vector_of(PNG, weights=tmp_path / "seven.pth", **SQUEEZENET)
    assert cosine(vector, expected) >= 0.9999
    message = refused(tmp_path / "seven.pth", layer="logits")
    assert "do not fit 'squeezenet1_1'" in message
    assert "classifier.1.weight is (7, 512, 1, 1) in the file, (1000, 512, 1, 1) in the" in message
    assert message.endswith("layer='pooled' does not need the classifier")


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert str(tmp_path / "none.pth") in refused(tmp_path / "none.pth")


def test_a_file_is_known_by_its_content(weights, tmp_path):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    copy = shutil.copy(weights, tmp_path / "other name.pth")
    plans = [make_plan(weights=str(path), **SQUEEZENET) for path in (weights, copy)]
    assert plans[0] == plans[1]
    assert plans[0].spec.weights == f"sha256:{digest}"
    assert [digest in name for name in plans[0].files] == [True]


def altered_after(vectorizer: ImageVectorizer, path: Path) -> str:
    """The error of a vectorizer whose weights are overwritten before it runs."""
    data = bytearray(path.read_bytes())
    before = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError) as error:
        vectorizer.extract_features(PNG)
    assert before in str(error.value)
    assert hashlib.sha256(data).hexdigest() in str(error.value)
    return str(error.value)


def test_a_file_that_is_altered_is_refused_with_both_digests(tmp_path):
    path = tmp_path / "weights.pth"
    saved(squeezenet1_1, path, seed=5)
    vectorizer = ImageVectorizer(weights=str(path), **SQUEEZENET)
    (name,) = make_plan(weights=str(path), **SQUEEZENET).files
    (cached,) = Path(os.environ["XDG_CACHE_HOME"]).rglob(name)
    assert "was altered" in altered_after(vectorizer, cached)


def test_an_altered_cache_is_repaired_from_the_file(tmp_path):
    path = tmp_path / "weights.pth"
    saved(squeezenet1_1, path, seed=6)
    (name,) = make_plan(weights=str(path), **SQUEEZENET).files
    (cached,) = Path(os.environ["XDG_CACHE_HOME"]).rglob(name)
    cached.unlink()
    cached.write_bytes(b"something else")
    assert len(vector_of(PNG, weights=str(path), **SQUEEZENET)) == 512


def test_writing_over_the_original_leaves_what_is_in_use(tmp_path):
    path = tmp_path / "weights.pth"
    model: Any = saved(squeezenet1_1, path, seed=9)
    vectorizer = ImageVectorizer(weights=str(path), **SQUEEZENET)
    saved(squeezenet1_1, path, seed=10)
    image = preprocess(pixels_of(photo()), Preprocessing())[None]
    with torch.inference_mode():
        expected = model.features(image).mean((2, 3))[0]
    assert cosine(vectorizer.extract_features(PNG), expected) >= 0.9999


def test_a_new_file_at_the_same_path_is_another_model(tmp_path):
    path = tmp_path / "weights.pth"
    vectors = []
    for seed in (7, 8):
        saved(squeezenet1_1, path, seed=seed)
        vectors.append(vector_of(PNG, weights=str(path), **SQUEEZENET))
    assert vectors[0] != vectors[1]


def test_random_weights_are_the_same_everywhere():
    here = vector_of(PNG, model="squeezenet1_1", weights="random")
    there = run_python(f"""
import torch
torch.manual_seed(99)
from imagevec import ImageVectorizer
vectorizer = ImageVectorizer(model="squeezenet1_1", weights="random", engine="torch")
print(vectorizer.extract_features({PNG!r}))
""")
    np.testing.assert_allclose(here, eval(there), rtol=1e-5)


def test_random_weights_are_not_all_alike():
    vector = vector_of(PNG, model="squeezenet1_1", weights="random")
    assert len({round(value, 4) for value in vector}) > 100


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize("model", ["squeezenet1_1", tiny], ids=["name", "factory"])
def test_the_random_numbers_of_the_process_are_left_alone(model, engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        states: Any = np.random.get_state()
        before = torch.get_rng_state(), states[1].copy()
        vector_of(PNG, model=model, weights="random", engine=engine)
        assert torch.equal(before[0], torch.get_rng_state())
        states = np.random.get_state()
        assert (before[1] == states[1]).all()


def test_a_factorys_own_weights_are_drawn_once():
    def unseeded() -> nn.Module:
        return Tiny()

    vectorizer = ImageVectorizer(model=unseeded, engine="torch")
    copy = pickle.loads(cloudpickle.dumps(vectorizer))
    assert vectorizer.extract_features(PNG) == copy.extract_features(PNG)


def fail_to_download(*args: object, **kwargs: object) -> None:
    raise urllib.error.URLError("no network")


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail_to_download)
    with pytest.raises(WeightsError) as error:
        ImageVectorizer(model="squeezenet1_1")
    message = str(error.value)
    assert "no network" in message
    assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth" in message
    assert "weights='<path>'" in message
    assert "weights='random'" in message
    assert str(Path(torch.hub.get_dir()) / "checkpoints") in message


def test_timms_download_that_fails_says_what_to_do():
    pytest.importorskip("timm")
    with pytest.raises(WeightsError, match="weights of timm/resnet18.*weights='<path>'"):
        ImageVectorizer(model="timm/resnet18")


def test_a_download_is_verified(monkeypatch):
    asked = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(WeightsError, match="invalid hash value"):
        ImageVectorizer(model="squeezenet1_1", weights="IMAGENET1K_V1")
    assert asked == [("https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", "b8a52dc0")]


def test_what_is_in_torch_hubs_cache_is_not_downloaded(weights, vector, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail_to_download)
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(weights, tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    assert vector_of(PNG, **SQUEEZENET) == vector


def pixels(size: int = 32) -> torch.Tensor:
    """Returns images ``(2, 3, S, S)``."""
    return torch.rand(2, 3, size, size, generator=torch.manual_seed(3))


def loaded(factory: Callable[[], nn.Module], path: Path, layer: Any = "pooled") -> nn.Module:
    """Returns the features of a factory's model with the weights of a file."""
    source = FactorySource(factory)
    model = with_weights(source, Preprocessing(), path)
    features = to_feature_model(model, layer, False, lambda count: pixels()[:count])
    check_loaded(model, features)
    return features


def seed_of(path: Path) -> int:
    """Returns the seed of the weights in ``forms`` that a file gives."""
    found = with_weights(FactorySource(forms.small), Preprocessing(), path).state_dict()
    return next(s for s in (1, 2) if torch.equal(found["fc.bias"], forms.state(seed=s)["fc.bias"]))


def write(tensors: Any, folder: Path) -> Path:
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


def test_old_keys_that_a_module_converts(tmp_path):
    state_dict = saved(tiny_vit, tmp_path / "new.pth").state_dict()
    old = {key.replace("mlp.0", "mlp.linear_1"): value for key, value in state_dict.items()}
    assert old.keys() != state_dict.keys()
    path = write({"state_dict": {f"module.{k}": v for k, v in old.items()}}, tmp_path)
    with torch.inference_mode():
        expected = loaded(tiny_vit, tmp_path / "new.pth")(pixels())
        assert torch.equal(loaded(tiny_vit, path)(pixels()), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_model_that_asks_for_its_version(suffix, tmp_path):
    state_dict = mnasnet0_5(weights=None).state_dict()
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state_dict, path)
    model = with_weights(TorchvisionSource("mnasnet0_5"), Preprocessing(), path)
    assert torch.equal(model.state_dict()["classifier.1.bias"], state_dict["classifier.1.bias"])


@pytest.mark.parametrize("aux_logits", [True, False])
def test_auxiliary_classifiers_are_not_needed(aux_logits, tmp_path):
    model: Any = googlenet(
        weights=None, num_classes=10, aux_logits=aux_logits, init_weights=False
    ).eval()
    path = write(model.state_dict(), tmp_path)
    ours = with_weights(TorchvisionSource("googlenet"), Preprocessing(), path)
    features = to_feature_model(ours, "pooled", False, lambda count: pixels(64)[:count]).eval()
    check_loaded(ours, features)
    model.fc, model.transform_input = nn.Identity(), True
    with torch.inference_mode():
        assert cosine(features(pixels(64))[0], model(pixels(64))[0]) >= 0.9999


def test_timm_model_with_another_classifier(tmp_path):
    timm = pytest.importorskip("timm")
    options: dict[str, Any] = {"model": "timm/test_vit", "engine": "torch"}
    model = timm.create_model("test_vit", num_classes=7).eval()
    path = write({"state_dict": model.state_dict(), "arch": "test_vit"}, tmp_path)
    model.reset_classifier(0)
    vectors = [vector_of(PNG, weights=str(path), **options)]
    vectors.append(vector_of(PNG, weights=str(write(model.state_dict(), tmp_path)), **options))
    assert vectors[0] == vectors[1]
    assert "head.weight (1000, 64) is not in the file" in refused(
        path, "timm/test_vit", layer="logits"
    )


def test_layer_needs_only_the_parts_before_it(tmp_path):
    state_dict = forms.state()
    early = {key: value for key, value in state_dict.items() if not key.startswith("layer1.1")}
    whole, part = tmp_path / "whole.pth", write(early, tmp_path)
    torch.save(state_dict, whole)
    with torch.inference_mode():
        for layer in ("layer1.0", ("bn", "layer1.0")):
            expected = loaded(forms.small, whole, layer)(pixels())
            assert torch.equal(loaded(forms.small, part, layer)(pixels()), expected)
    for layer in ("pooled", "layer1", ("layer1.0", "pooled")):
        with pytest.raises(WeightsError, match=r"layer1.1.weight \(8,\) is not in the file"):
            loaded(forms.small, part, layer)


@pytest.mark.parametrize(
    "key",
    ["layer1.0.se.weight", "bn.gamma", "norm_pre.weight", "reg_token", "layer2.0.weight", "neck.w"],
)
def test_part_that_the_model_lacks_is_an_error(key, tmp_path):
    path = write({**forms.state(), key: torch.ones(8)}, tmp_path)
    with pytest.raises(WeightsError, match=rf"16 of 16 fit, but the model lacks {key} \(8,\)"):
        loaded(forms.small, path)


@pytest.mark.parametrize(
    "key",
    ["head.0.weight", "fc2.weight", "projection_head.weight", "decoder_blocks.0.weight", "queue"]
    + ["mask_token", "loss.weight", "layer1.0.total_ops", "aux_logits.fc.weight", "fc.0.weight"],
)
def test_part_beside_the_model_is_logged(key, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    loaded(forms.small, write({**forms.state(), key: torch.ones(8)}, tmp_path))
    assert f"Not needed: {key} (8,)" in caplog.text


def with_stem() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 3, 1, bias=False), body=forms.small()))


def test_prefix_is_not_replaced_by_itself(tmp_path):
    tensors = with_stem().state_dict()
    body = {key for key, tensor in tensors.items() if key.startswith("body.") and tensor.ndim}
    other = {**tensors, **dict.fromkeys(body, torch.ones(9, 9))}
    path = write(other, tmp_path)
    with pytest.raises(WeightsError, match=r"the keys of \S+: 3 of 17 fit. body.conv.weight is"):
        loaded(with_stem, path)


def test_choice_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    others = {f"state_dict_ema.{key}": value for key, value in forms.state(seed=2).items()}
    named = {"state_dict": forms.under("net."), **others}
    assert seed_of(write(named, tmp_path)) == 2
    record = next(record for record in caplog.records if "several sets" in record.getMessage())
    assert record.levelname == "INFO"
    assert (
        "using the keys under 'state_dict_ema.', not those under 'state_dict.net.'" in caplog.text
    )
    assert "keys under 'state_dict_ema.': 16 of 16 fit after removing it" in caplog.text


@pytest.mark.parametrize(
    "name", ["ema", "EMA", "model_ema", "swa_model", "model_avg", "average_model", "teacher"]
)
def test_averages_are_chosen_by_their_name(name, tmp_path):
    assert seed_of(write({"model": forms.state(seed=2), name: forms.state()}, tmp_path)) == 1


def test_choice_that_no_name_decides_is_a_warning(tmp_path, caplog):
    pair = {**forms.under("encoder_q."), **forms.under("encoder_k.", forms.state(seed=2))}
    assert seed_of(write(pair, tmp_path)) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "using the keys under 'encoder_q.', not those under 'encoder_k.'" in caplog.text


def test_averages_that_lack_a_part_are_not_taken(tmp_path, caplog):
    partial = {key: value for key, value in forms.state(seed=2).items() if "running" not in key}
    named = {"state_dict": forms.state(), "state_dict_ema": partial}
    assert seed_of(write(named, tmp_path)) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "using the keys under 'state_dict.', not those under 'state_dict_ema.'" in caplog.text


def test_tied_tensor_that_is_saved_once(tmp_path):
    def factory() -> nn.Module:
        model: Any = forms.Small()
        model.layer1[0].weight = model.twin = nn.Parameter(torch.zeros(8, 8, 3, 3))
        return model

    loaded(factory, write(forms.state(), tmp_path))


def test_archive_of_torchscript_runs_nothing(tmp_path):
    trap = Malicious(tmp_path / "code was run")
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps({"a": trap}, protocol=2))
        archive.writestr("script/constants.pkl", pickle.dumps((), protocol=2))
    assert "script.pt is not a weights file" in refused(path)
    assert not trap.folder.exists()


def test_compiled_model_takes_plain_keys(tmp_path):
    def compiled() -> nn.Module:
        model = nn.Module()
        model._orig_mod = forms.Small()  # as torch.compile names it
        model.forward = model._orig_mod.forward
        return model

    model = with_weights(FactorySource(compiled), Preprocessing(), write(forms.state(), tmp_path))
    assert torch.equal(model.state_dict()["_orig_mod.fc.bias"], forms.state()["fc.bias"])

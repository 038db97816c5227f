"""Each form of a model in files gives the vectors of its own library, or the stated error.

``IMAGEVEC_WRITE_DOCS=1 pytest tests/models/test_model_forms.py`` writes the table of
``docs/checkpoints.md``, which the test compares.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagevec import ImageVectorizer, Preprocessing
from imagevec.errors import ImageVecError
from imagevec.images.preprocess import resize_and_crop
from tests.helpers.folders import write as write_transformers
from tests.helpers.images import cosine, encode, photo
from tests.helpers.onnx_files import INT64, UINT8, expected_of, network, node, write
from tests.helpers.pages import check_table
from tests.helpers.pipeline import pixels_of
from tests.helpers.repositories import write_clip, write_timm
from tests.models.forms import Form
from tests.models.test_checkpoints import PAGE

pytest.importorskip("openvino")
pytest.importorskip("timm")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")

GROUP = "models in files"
IMAGE = photo(64, 64)


def onnx_form(name: str, error: str = "", make: Any = network, **options: Any) -> Form:
    """An ONNX file, compared with ONNX Runtime."""

    def written(folder: Path) -> Mapping[str, Any]:
        path = make(folder / "net.onnx", **options)
        if error:
            return {"model": path}
        how = Preprocessing(resize_size=36, crop_size=32)
        pixels = resize_and_crop(pixels_of(IMAGE), how)[None]
        return {"model": path, "_expected": expected_of(path, pixels, how)[0]}

    return Form(GROUP, name, written, error)


def folder_form(
    name: str, library: str, error: str = "", change: Callable[[Path], Any] = lambda folder: None
) -> Form:
    """A folder of timm or open_clip, which ``test_hub.py`` compares with the library."""

    def written(folder: Path) -> Mapping[str, Any]:
        model = {"timm": write_timm, "open_clip": write_clip}[library](folder / "mine")
        change(model)
        return {"model": f"{library}/local-dir:{model}"}

    return Form(GROUP, name, written, error)


def transformers_form(
    name: str,
    model: str = "vit",
    error: str = "",
    change: Callable[[Path], Any] = lambda folder: None,
) -> Form:
    """A folder of transformers, which ``test_transformers.py`` compares with ``AutoModel``."""

    def written(folder: Path) -> Mapping[str, Any]:
        write_transformers(model, folder / "mine")
        change(folder / "mine")
        return {"model": folder / "mine"}

    return Form(GROUP, name, written, error)


def edited(name: str, **changes: Any) -> Callable[[Path], Any]:
    """Returns a function that changes values of a JSON file in a folder."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def with_bytes(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def outside(path: Path) -> Path:
    network(path, save_as_external_data=True, size_threshold=0, location="net.data")
    path.write_bytes(path.read_bytes().replace(b"net.data", b"../x.bin"))
    return path


def flattened(path: Path, **options: Any) -> Path:
    return write(path, [node("Flatten", "images", "features")], {}, **options)


def maps(path: Path) -> Path:
    nodes = [node("MaxPool", "images", "features", kernel_shape=[4, 4], strides=[4, 4])]
    return write(path, nodes, {}, outputs=[("features", (None, 3, 8, 8))])


EXTERNAL: dict[str, Any] = {"save_as_external_data": True, "size_threshold": 0}

MODEL_FORMS = [
    onnx_form("`net.onnx`, any number of images"),
    onnx_form("`net.onnx`, one image", shape=(1, 3, 32, 32)),
    onnx_form("`net.onnx`, channels last", layout="NHWC"),
    onnx_form("`net.onnx` of `uint8`", dtype=UINT8),
    onnx_form("`net.onnx` with its weights in `net.data`", location="net.data", **EXTERNAL),
    onnx_form("`net.onnx` with its weights in another folder", "outside its folder", outside),
    onnx_form("`net.onnx` with two inputs", "2 inputs", flattened, inputs=("images", "mask")),
    onnx_form("`net.onnx` of texts", "int64", flattened, dtype=INT64, shape=(None, 77)),
    onnx_form("`net.onnx` that returns maps", "export the model", maps),
    onnx_form("`net.onnx` that ends early", "truncated", with_bytes(b"\x08\x08\x3a\x90\x01")),
    onnx_form(
        "`net.onnx`, a Git LFS pointer", "git lfs pull", with_bytes(b"version https://git-lfs")
    ),
    folder_form("a folder of timm", "timm"),
    folder_form(
        "a folder of timm without weights",
        "timm",
        "does not contain",
        lambda folder: (folder / "model.safetensors").unlink(),
    ),
    folder_form("a folder of open_clip", "open_clip"),
    folder_form(
        "a folder of open_clip without its configuration",
        "open_clip",
        "does not contain",
        lambda folder: (folder / "open_clip_config.json").unlink(),
    ),
    transformers_form("a folder of transformers"),
    transformers_form("a folder of transformers, a classifier", "vit-classifier"),
    transformers_form("a folder of transformers, a dual encoder", "clip"),
    transformers_form(
        "a folder of transformers without its preprocessing",
        error="has no preprocessor_config.json",
        change=lambda folder: (folder / "preprocessor_config.json").unlink(),
    ),
    transformers_form(
        "a folder of transformers with pickled weights",
        error="pytorch_model.bin",
        change=lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    ),
    transformers_form(
        "a folder of transformers with its own code",
        error="needs the code in its folder",
        change=edited("config.json", auto_map={"AutoModel": "modeling_own.Own"}),
    ),
    transformers_form(
        "a folder of transformers whose preprocessing reverses the channels",
        error="channel",
        change=edited("preprocessor_config.json", do_flip_channel_order=True),
    ),
    Form(GROUP, "a folder that does not exist", lambda f: {"model": "timm/local-dir:x"}, "no such"),
]


@functools.cache
def outcome(form: Form) -> str:
    """Returns ``"loads"``, or the error message."""
    with tempfile.TemporaryDirectory() as folder:
        options = dict(form.write(Path(folder)))
        expected = options.pop("_expected", None)
        try:
            vector: Any = ImageVectorizer(**options).extract_features(encode(IMAGE))
        except ImageVecError as error:
            return f"`{str(error).replace(folder, 'folder')}`"
        assert np.isfinite(vector).all()
        assert expected is None or cosine(vector, expected) >= 0.9999
        return "loads"


@pytest.mark.parametrize("form", MODEL_FORMS, ids=lambda form: form.name)
def test_a_form(form: Form) -> None:
    assert form.error in outcome(form) if form.error else outcome(form) == "loads"


def test_the_page_has_the_rows() -> None:
    rows = [f"| {form.name} | {outcome(form)} |" for form in MODEL_FORMS]
    check_table(PAGE, GROUP, ("form", "result"), rows)

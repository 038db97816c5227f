"""ONNX files, compared with ONNX Runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from imagevec import (
    ImageFeaturizer,
    ImageVectorizer,
    MissingExtraError,
    OptionError,
    Preprocessing,
    WeightsError,
    cache,
    plan,
    register_model,
)
from imagevec.images.preprocess import resize_and_crop
from imagevec.models import onnx_file
from imagevec.models.registry import check_is_name, find_source, named
from imagevec.plan import make_plan
from imagevec.runtime import get_engine
from imagevec.search.similar import similar
from tests.helpers.images import encode, photo
from tests.helpers.onnx_files import (
    DOUBLE,
    FLOAT,
    HALF,
    INT64,
    UINT8,
    expected_of,
    network,
    node,
    onnx,
    onnxruntime,
    weights,
    write,
)
from tests.helpers.pipeline import pixels_of, vector_of
from tests.helpers.tables import write_made_of

pytest.importorskip("openvino")

IMAGES = [pixels_of(photo(60 + seed, 50, seed)) for seed in range(8)]


def export(model: nn.Module, path: Path, dynamo: bool, batch: str, size: int = 32) -> Path:
    """Exports a model with PyTorch, for one image or for any number."""
    any_batch: dict[str, Any] = {"dynamic_axes": {"images": {0: "batch"}, "features": {0: "batch"}}}
    if dynamo:
        any_batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    images = torch.zeros(1 if batch == "one" else 2, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (images,),
            path,
            dynamo=dynamo,
            input_names=["images"],
            output_names=["features"],
            external_data=False,
            verbose=False,
            **({} if batch == "one" else any_batch),
        )
    return path


def check_vectors(path: Path, lowest: float = 0.9999, **options: Any) -> Any:
    """Compares vectors of 1, 2, 3 and 8 images with those of ONNX Runtime. Returns the spec."""
    plan = make_plan(**{"model": str(path), **options})
    engine = get_engine(plan, cache.stored, "cpu", threads=1)
    how = plan.spec.preprocessing
    assert isinstance(how, Preprocessing)
    images = np.stack([resize_and_crop(pixels, how) for pixels in IMAGES])
    expected = expected_of(path, images, how)
    for count in (1, 2, 3, 8):
        vectors = engine(images[:count])
        assert vectors.shape == (count, plan.spec.num_features) and vectors.dtype == np.float32
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected[:count], axis=1)
        cosines = (vectors * expected[:count]).sum(1) / norms
        assert cosines.min() >= lowest
        np.testing.assert_allclose(vectors, expected[:count], rtol=0.01, atol=0.01 * norms.max())
    return plan.spec


def resnet18() -> nn.Module:
    import torchvision

    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    return model


class ClipTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        transformers: Any = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 16}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
        self.tower = transformers.CLIPVisionModelWithProjection(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.tower(pixel_values=images).image_embeds
        return vectors


@pytest.mark.models
@pytest.mark.parametrize("batch", ["one", "any"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("model", [resnet18, vit, ClipTower], ids=["resnet18", "vit", "clip"])
def test_exported_models_equal_onnx_runtime(model, dynamo, batch, tmp_path):
    if dynamo:
        pytest.importorskip("onnxscript")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        path = export(model(), tmp_path / "net.onnx", dynamo, batch)
    check_vectors(path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"opset": 11},
        {"opset": 23},
        {"shape": (1, 3, 32, 32)},
        {"shape": (4, 3, 32, 32)},
        {"layout": "NHWC"},
        {"layout": "NHWC", "shape": (1, 32, 32, 3)},
        {"dtype": UINT8},
        {"dtype": UINT8, "layout": "NHWC"},
        {"dtype": HALF},
        {"dtype": DOUBLE},
        {"save_as_external_data": True, "size_threshold": 0, "location": "net.data"},
        {"save_as_external_data": True, "size_threshold": 0, "all_tensors_to_one_file": False},
    ],
    ids=str,
)
def test_graphs_equal_onnx_runtime(options, tmp_path):
    spec = check_vectors(network(tmp_path / "net.onnx", **options), 0.9999)
    is_uint8 = options.get("dtype") == UINT8
    mean, std = (
        ((0.0,) * 3, (1 / 255,) * 3) if is_uint8 else (Preprocessing.mean, Preprocessing.std)
    )
    expected = Preprocessing(resize_size=36, crop_size=32, mean=mean, std=std)
    assert spec.preprocessing == expected


def test_precisions_and_normalize(tmp_path):
    path = network(tmp_path / "net.onnx")
    check_vectors(path, 0.99, precision="bfloat16")
    vector = vector_of(encode(photo()), model=path, engine="openvino")
    unit = vector_of(encode(photo()), model=path, engine="openvino", normalize=True)
    np.testing.assert_allclose(unit, vector / np.linalg.norm(vector), rtol=1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        # (N, 96, 32) for one image; two images of half the height for two
        [node("Reshape", "images one_image", "x"), node("ReduceMean", "x", "y", axes=[1])],
        # the vector of an image depends on the others of its batch
        [
            node("ReduceMean", "images", "mean", axes=[0]),
            node("Sub", "images mean", "x"),
            node("ReduceMean", "x", "y", axes=[2, 3]),
            node("ReduceMean", "images", "z", axes=[2, 3]),
            node("Add", "y z", "w"),
        ],
    ],
    ids=["shape", "statistics"],
)
@pytest.mark.parametrize("batch", [1, None], ids=str)
def test_graph_of_one_image_runs_for_each(nodes, batch, tmp_path, caplog):
    nodes = [*nodes, node("Flatten", nodes[-1].output[0], "features")]
    tensors = {"one_image": np.array([1, 96, 32])}
    path = write(
        tmp_path / "net.onnx",
        nodes,
        tensors,
        shape=(batch, 3, 32, 32),
        outputs=[("features", (batch, None))],
    )
    with caplog.at_level(logging.WARNING):
        check_vectors(path)
    assert "net.onnx computes one image at a time" in caplog.text


def test_batch_of_another_size_that_is_fixed_is_refused(tmp_path):
    nodes = [node("Reshape", "images shape", "features")]
    tensors = {"shape": np.array([4, 3072])}
    options: dict[str, Any] = {"shape": (4, 3, 32, 32), "outputs": [("features", (4, 3072))]}
    path = write(tmp_path / "net.onnx", nodes, tensors, **options)
    with pytest.raises(OptionError, match="net.onnx only takes batches of 4: export it with"):
        make_plan(model=path)


def several_outputs(path: Path, **options: Any) -> Path:
    nodes = [
        node("Conv", "images kernel", "maps", strides=[4, 4]),
        node("GlobalAveragePool", "maps", "pooler"),
        node("Flatten", "pooler", "vector"),
        node("MatMul", "vector matrix", "logits"),
        node("ArgMax", "logits", "index", axis=1, keepdims=1),
        node("Cast", "index", "class", to=FLOAT),
    ]
    tensors = {"kernel": weights(8, 3, 5, 5), "matrix": weights(8, 5)}
    sides = {"maps": (None, 8, 7, 7), "pooler": (None, 8, 1, 1), "logits": (None, 5)}
    names = options.pop("names", tuple(sides))
    outputs = [(name, sides[name]) for name in names]
    real = {name: value.astype(np.float32) for name, value in tensors.items()}
    return write(path, nodes, real, outputs=outputs, **options)


def test_layer_chooses_an_output(tmp_path):
    path = several_outputs(tmp_path / "net.onnx")
    image = encode(photo())
    both = vector_of(image, model=path, engine="openvino", layer=("logits", "pooler"))
    for name, size in (("logits", 5), ("pooler", 8)):
        vector = vector_of(image, model=path, engine="openvino", layer=name)
        assert len(vector) == size
        np.testing.assert_allclose(both[name], vector, rtol=1e-4, atol=1e-6)
        how = make_plan(model=path, layer=name).spec.preprocessing
        assert isinstance(how, Preprocessing)
        pixels = resize_and_crop(pixels_of(photo()), how)[None]
        np.testing.assert_allclose(
            vector, expected_of(path, pixels, how, name)[0], rtol=1e-3, atol=1e-5
        )
    units = vector_of(
        image, model=path, engine="openvino", layer=("logits", "pooler"), normalize=True
    )
    assert [np.linalg.norm(units[name]) for name in units] == pytest.approx([1, 1], abs=1e-5)


def test_pooled_is_the_only_output_that_is_a_vector(tmp_path):
    path = several_outputs(tmp_path / "net.onnx", names=("maps", "logits"))
    assert make_plan(model=path).spec.num_features == 5


@pytest.mark.parametrize(
    ("names", "layer", "message"),
    [
        (
            ("pooler", "logits"),
            "pooled",
            "2 of the outputs of net.onnx are vectors.*layer='pooler'",
        ),
        (
            ("maps",),
            "pooled",
            r"none of the outputs .*: export the model .*maps float32 \[1,8,7,7\]",
        ),
        (("maps", "logits"), "maps", r"it is float32 \[1,8,7,7\].*: use one of 'logits'"),
        (("maps", "logits"), "logit", "layer='logit' is not known: did you mean 'logits'"),
        (("logits",), ("pooled", "fc"), "layer='fc' is not known"),
    ],
    ids=str,
)
def test_layer_that_is_no_vector_is_refused(names, layer, message, tmp_path):
    path = several_outputs(tmp_path / "net.onnx", names=names)
    with pytest.raises(OptionError, match=message):
        make_plan(model=path, layer=layer)


IDENTITY = [node("Flatten", "images", "features")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ("images", "mask")}, r"takes 2 inputs \(images, mask\). Export a model that"),
        (
            {"dtype": INT64, "shape": (None, 77)},
            r"its input is images, int64 \(\?, 77\), not images",
        ),
        (
            {"shape": (None, 1, 32, 32)},
            r"its input is images, float32 \(\?, 1, 32, 32\), not images",
        ),
        ({"shape": (None, 4, 32, 32)}, "not images, float or uint8"),
        ({"shape": (3, 32, 32)}, r"float32 \(3, 32, 32\), not images"),
        ({"shape": ()}, r"float32 \(\), not images"),
    ],
    ids=str,
)
def test_other_inputs_are_refused(options, message, tmp_path):
    write(tmp_path / "net.onnx", IDENTITY, {}, **options)
    with pytest.raises(OptionError, match=message):
        make_plan(model=tmp_path / "net.onnx")


def test_integers_are_not_features(tmp_path):
    nodes = [node("ReduceMean", "images", "x", axes=[2, 3], keepdims=0)]
    nodes += [node("Cast", "x", "features", to=INT64)]
    path = write(tmp_path / "net.onnx", nodes, {}, out_dtype=INT64)
    with pytest.raises(OptionError, match=r"none of the outputs.*features i64 \[1,3\]"):
        make_plan(model=path)


def test_custom_operators_are_refused_by_name(tmp_path):
    nodes = [onnx.helper.make_node("Magic", ["images"], ["features"], domain="mine")]
    path = write(tmp_path / "net.onnx", nodes, {})
    with pytest.raises(OptionError, match="OpenVINO cannot convert .*net.onnx: .*Magic"):
        make_plan(model=path)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "contains NaN in 'matrix'"), (np.inf, "that are not finite")]
)
def test_weights_that_are_not_numbers_are_refused(value, message, tmp_path):
    matrix = weights(3072, 6).astype(np.float32)
    matrix[0, 0] = value
    nodes = [node("Flatten", "images", "x"), node("MatMul", "x matrix", "features")]
    path = write(tmp_path / "net.onnx", nodes, {"matrix": matrix})
    with pytest.raises(WeightsError, match=f"net.onnx .*{message}"):
        make_plan(model=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(40), "is an archive"),
        (b"<!DOCTYPE html><html></html>", "is not an ONNX file"),
        (b"garbage", "is not an ONNX file"),
        (bytes(1000), "is not an ONNX file"),
        (b"\x08\x08", "has no graph with inputs and outputs"),
    ],
    ids=lambda content: repr(content)[:20],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"net.onnx .*{message}"):
        make_plan(model=path)


def test_every_truncated_file_is_refused(tmp_path):
    whole = network(tmp_path / "net.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for length in {*range(1, len(whole), 97), len(whole) - 3}:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="cut.onnx is not an ONNX file"):
            onnx_file.read(path)


def with_location(path: Path, location: str, data: str = "net.data", **entries: str) -> Path:
    """Writes a graph whose weights are in another file, and changes its name in the graph."""
    network(path, save_as_external_data=True, size_threshold=0, location=data)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("kind", ["parent", "absolute", "windows", "link", "folder", "memory"])
def test_external_data_outside_the_folder_is_refused(kind, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "net.data"
    names = {"parent": "../net.data", "absolute": str(outside), "windows": "..\\net.data"}
    names |= {"folder": "sub/net.data", "memory": "*/_ORT_MEM_ADDR_/*"}
    path = with_location(folder / "net.onnx", names.get(kind, "net.data"))
    shutil.move(folder / "net.data", outside)
    if kind == "link":
        (folder / "net.data").symlink_to(outside)
    if kind == "folder":
        (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(WeightsError, match="it names a file outside its folder"):
        make_plan(model=path)


def test_external_data_of_nested_graphs_is_checked(tmp_path):
    tensor = onnx.numpy_helper.from_array(weights(3, 4).astype(np.float32), "inner")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["y"], value=tensor)],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("y", FLOAT, None)],
    )
    nodes = [
        node("Size", "images", "size"),
        node("Cast", "size", "is", to=onnx.TensorProto.BOOL),
        onnx.helper.make_node("If", ["is"], ["features"], then_branch=branch, else_branch=branch),
    ]
    path = write(tmp_path / "net.onnx", nodes, {})
    with pytest.raises(WeightsError, match=r"outside its folder, '\.\./secret'"):
        make_plan(model=path)


def test_the_last_of_repeated_names_of_files_counts(tmp_path):
    """As in protobuf: a parser that took the first would check another file than the one read."""
    path = with_location(tmp_path / "net.onnx", "net.data")
    entry = onnx.StringStringEntryProto(key="location", value="net.data").SerializeToString()
    twice = entry + onnx.StringStringEntryProto(value="../secret").SerializeToString()
    tensor = b"\x6a" + bytes([len(twice)]) + twice  # field 13
    graph = b"\x2a" + bytes([len(tensor)]) + tensor  # field 5
    path.write_bytes(path.read_bytes() + b"\x3a" + bytes([len(graph)]) + graph)  # field 7
    read = onnx.load_model_from_string(path.read_bytes()).graph.initializer[-1]
    assert [pair.value for pair in read.external_data] == ["../secret"]
    with pytest.raises(WeightsError, match=r"outside its folder, '\.\./secret'"):
        onnx_file.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.unlink(), "net.onnx needs 'net.data' in its folder"),
        (lambda data: os.truncate(data, 100), "net.data is truncated: it has 100 of"),
        (lambda data: data.write_bytes(b"version https://git-lfs"), "net.data is a Git LFS"),
        (lambda data: data.write_bytes(b""), "net.data is empty"),
    ],
    ids=["missing", "truncated", "pointer", "empty"],
)
def test_damaged_external_data_is_refused(change, message, tmp_path):
    path = with_location(tmp_path / "net.onnx", "net.data")
    change(tmp_path / "net.data")
    with pytest.raises(WeightsError, match=message):
        make_plan(model=path)


def test_files_of_the_hubs_cache_are_links_to_one_folder(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    with_location(tmp_path / "net.onnx", "net.data")
    for name in ("net.onnx", "net.data"):
        shutil.move(tmp_path / name, blobs / hashlib.sha256(name.encode()).hexdigest())
        blob = blobs / hashlib.sha256(name.encode()).hexdigest()
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    check_vectors(snapshot / "net.onnx")


def test_spec_and_digest(tmp_path):
    path = network(tmp_path / "net.onnx")
    spec = make_plan(model=path).spec
    assert (spec.model, spec.num_features) == ("onnx:net", 6)
    assert spec.weights == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert find_source(path).files("DEFAULT") == [path]


def test_digest_covers_external_data(tmp_path):
    path = with_location(tmp_path / "net.onnx", "net.data")
    data = tmp_path / "net.data"
    assert find_source(path).files("DEFAULT") == [path, data]
    lines = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in (path, data)
    )
    before = make_plan(model=path).spec
    assert before.weights == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    content = bytearray(data.read_bytes())
    content[3] ^= 1  # a bit of the exponent of the first number
    data.write_bytes(content)
    after = make_plan(model=path).spec
    assert (after.weights, after.fingerprint) != (before.weights, before.fingerprint)
    check_vectors(path)


def test_queries_of_a_table_made_with_a_registered_file(tmp_path):
    register_model("of-table", with_location(tmp_path / "net.onnx", "net.data"))
    vectorizer = ImageVectorizer(model="of-table")
    files = [encode(photo(60 + seed, 50, seed)) for seed in range(3)]
    rows = {f"file:/{seed}.png": vectorizer.extract_features(x) for seed, x in enumerate(files)}
    folder = write_made_of(tmp_path / "table", rows, vectorizer.spec.metadata)
    (tmp_path / "query.png").write_bytes(files[1])
    (found,) = similar(folder, [str(tmp_path / "query.png")], 1)
    assert [x["path"] for x in found["neighbours"]] == ["file:/1.png"]


@pytest.mark.parametrize("name", ["model.onnx", "onnx/model.onnx"])
def test_folder_with_a_model(name, tmp_path):
    (tmp_path / "onnx").mkdir()
    network(tmp_path / name)
    assert make_plan(model=tmp_path).spec.model == "onnx:model"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert getattr(find_source(tmp_path / name), "path", None) == tmp_path / name
    with pytest.raises(OptionError):  # the weights of another source
        find_source(tmp_path)


def test_registered_with_its_preprocessing(tmp_path):
    path = network(tmp_path / "net.onnx")
    preprocessing = Preprocessing(resize_size=40, crop_size=32, mean=(0.5, 0.5, 0.5))
    register_model("onnx registered", path, preprocessing=preprocessing)
    spec = check_vectors_of("onnx registered", path)
    assert (spec.model, spec.preprocessing) == ("onnx registered", preprocessing)
    register_model("onnx too large", path, preprocessing=Preprocessing())
    with pytest.raises(OptionError, match="crop_size=224 is not valid: net.onnx takes .* 32x32"):
        make_plan(model="onnx too large")


def check_vectors_of(name: str, path: Path) -> Any:
    spec = make_plan(model=name).spec
    how = spec.preprocessing
    assert isinstance(how, Preprocessing)
    pixels = resize_and_crop(pixels_of(photo()), how)[None]
    vector = vector_of(encode(photo()), model=name, engine="openvino")
    np.testing.assert_allclose(vector, expected_of(path, pixels, how)[0], rtol=1e-3, atol=1e-5)
    return spec


@pytest.mark.parametrize("folder", [".", "onnx"])
def test_preprocessor_config_of_the_folder(folder, tmp_path):
    (tmp_path / folder).mkdir(exist_ok=True)
    path = network(tmp_path / folder / "model.onnx")
    size = {"height": 32, "width": 32}
    config: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    half = (0.5, 0.5, 0.5)
    expected = Preprocessing(resize_size=32, crop_size=32, mean=half, std=half, squash=True)
    spec = check_vectors(path)
    assert dataclasses.replace(spec.preprocessing, crop_offset="round") == expected
    assert make_plan(model=tmp_path).spec == spec
    config["image_mean"] = [0.25, 0.5, 0.5]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert check_vectors(path).preprocessing.mean == (0.25, 0.5, 0.5)


def test_graph_that_normalises_itself_takes_scaled_pixels(tmp_path):
    path = network(tmp_path / "net.onnx")
    for mean, std, scale in (((0,) * 3, (1,) * 3, 1), ((0,) * 3, (1 / 255,) * 3, 255)):
        preprocessing = Preprocessing(resize_size=36, crop_size=32, mean=mean, std=std)
        register_model(f"onnx scaled {scale}", path, preprocessing=preprocessing)
        vector = vector_of(encode(photo()), model=f"onnx scaled {scale}", engine="openvino")
        pixels = resize_and_crop(pixels_of(photo()), preprocessing)[None] / 255 * scale
        session = onnxruntime.InferenceSession(path)
        given = {"images": pixels.transpose(0, 3, 1, 2).astype(np.float32)}
        np.testing.assert_allclose(vector, session.run(None, given)[0][0], rtol=1e-3, atol=1e-4)


def any_size(path: Path, shape: Any = (None, None, None, None)) -> Path:
    """Writes a graph whose channels are only known by its weights, as optimum does."""
    nodes = [node("Conv", "images kernel", "x"), node("GlobalAveragePool", "x", "features")]
    kernel = weights(8, 3, 5, 5).astype(np.float32)
    outputs = [("features", (None, 8, 1, 1))]
    return write(path, nodes, {"kernel": kernel}, shape=shape, outputs=outputs)


def test_any_size(tmp_path):
    path = any_size(tmp_path / "net.onnx")
    assert check_vectors(path).preprocessing == Preprocessing()
    size = check_vectors(path, input_size=(64, 96)).preprocessing
    assert size.input_size == (64, 96)
    with pytest.raises(OptionError, match="input_size=64 is not valid: 'onnx:fixed' only takes 32"):
        make_plan(model=network(tmp_path / "fixed.onnx"), input_size=64)


def test_size_that_the_graph_cannot_take_is_refused(tmp_path):
    nodes = [node("Flatten", "images", "x"), node("MatMul", "x matrix", "features")]
    matrix = weights(3 * 64 * 64, 4).astype(np.float32)
    options: dict[str, Any] = {"shape": (None, 3, None, None), "outputs": [("features", (None, 4))]}
    path = write(tmp_path / "net.onnx", nodes, {"matrix": matrix}, **options)
    with pytest.raises(
        OptionError, match="net.onnx cannot take RGB images of 224x224: .*Reshape x"
    ):
        make_plan(model=path)
    check_vectors(path, input_size=64)


def test_input_that_is_not_square(tmp_path):
    nodes = [node("Flatten", "images", "x"), node("MatMul", "x matrix", "features")]
    matrix = weights(3 * 32 * 48, 4).astype(np.float32)
    options: dict[str, Any] = {"shape": (None, 3, 32, 48), "outputs": [("features", (None, 4))]}
    path = write(tmp_path / "net.onnx", nodes, {"matrix": matrix}, **options)
    assert check_vectors(path).preprocessing == Preprocessing().with_input_size((32, 48))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "random"}, "weights='random' is not valid: net.onnx contains weights"),
        ({"engine": "torch"}, "torch cannot run .*net.onnx: use engine='openvino'"),
        ({"model": "no/such.onnx"}, "no/such.onnx': no such file"),
    ],
    ids=lambda option: next(iter(option)) if isinstance(option, dict) else "",
)
def test_wrong_options_are_refused(options, message, tmp_path):
    path = network(tmp_path / "net.onnx")
    with pytest.raises(OptionError, match=message):
        ImageVectorizer(**{"model": str(path), **options})


@pytest.mark.parametrize("engine", ["auto", "openvino"])
def test_without_openvino_the_extra_is_named(engine, tmp_path, monkeypatch):
    path = network(tmp_path / "net.onnx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no plan is remembered
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"imagevec\[openvino\]"):
        make_plan(model=path, engine=engine)


def test_files_are_only_given_by_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet50").mkdir()
    network(tmp_path / "resnet50" / "model.onnx")
    for name in ("resnet50", "net.onnx", "a/net.onnx"):
        with pytest.raises(OptionError, match="is not a name: models are only loaded from paths"):
            check_is_name(name, "a table")
    with pytest.raises(OptionError, match="'onnx:net', a file or folder: give it as --model"):
        named("onnx:net", "float32", "a table")


@pytest.mark.java
def test_pipelines_with_a_file_cannot_be_saved(spark, tmp_path):
    featurizer = ImageFeaturizer(model=str(network(tmp_path / "net.onnx")))
    with pytest.raises(OptionError, match="net.onnx' cannot be saved: pass the file again"):
        featurizer.save(str(tmp_path / "saved"))

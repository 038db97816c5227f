"""The forms in which models are passed: how each is written, and what it gives.

``test_checkpoints.py`` runs the forms, and compares the tables of ``docs/checkpoints.md``. A new
form is one more entry of ``FORMS``; a new group also needs its markers in the page.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import datetime
import functools
import gzip
import http.server
import io
import json
import os
import pickle
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers.factories import tiny_vit

State = dict[str, torch.Tensor]


class Small(nn.Module):
    """Maps ``(N, 3, S, S)`` to 8 pooled features and 5 logits, with batch norms."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel_size=5, stride=4)
        self.bn = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.layer1(self.bn(self.conv(images)).relu()).relu().mean((2, 3))
        logits: torch.Tensor = self.fc(features)
        return logits


class Wrapped(nn.Module):
    """A backbone under another name, with its own classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Small()
        self.backbone.fc = nn.Identity()  # type: ignore[assignment]
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.backbone(images))
        return logits


class Settings:
    """A class that only the training script has."""


def small() -> nn.Module:
    return Small()


def wrapped() -> nn.Module:
    return Wrapped()


@functools.cache
def trained(classes: int = 5, seed: int = 1) -> Small:
    """Builds a model with statistics of batch norms, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Small(classes)
        for _ in range(2):
            model(torch.rand(4, 3, 32, 32))
    return model.eval()


def state(classes: int = 5, seed: int = 1) -> State:
    return {key: tensor.clone() for key, tensor in trained(classes, seed).state_dict().items()}


def under(prefix: str, tensors: State | None = None) -> State:
    """Adds a prefix to all keys."""
    return {prefix + key: tensor for key, tensor in (tensors or state()).items()}


def without(*starts: str) -> State:
    return {key: tensor for key, tensor in state().items() if not key.startswith(starts)}


def inside(part: str, wrapper: str) -> State:
    """Adds a wrapper after a part of each key."""
    return {key.replace(part, f"{part}{wrapper}"): tensor for key, tensor in state().items()}


def projector() -> State:
    return {"projector.0.weight": torch.ones(4, 8), "projector.0.bias": torch.ones(4)}


@dataclass(frozen=True)
class Form:
    """One form of a model.

    Attributes:
        group: The table of ``docs/checkpoints.md`` that lists it.
        name: The first cell of its row, which is also its id.
        write: Writes it to a folder, and returns the options of a vectorizer.
        error: A part of the error message; empty if the vectors are those of the reference.
    """

    group: str
    name: str
    write: Callable[[Path], Mapping[str, Any]]
    error: str = ""


def saved(
    name: str, make: Callable[[], Any], error: str = "", file: str = "model.pth", **options: Any
) -> Form:
    """A checkpoint of ``Small`` that ``torch.save`` or safetensors writes."""

    def write(folder: Path) -> Mapping[str, Any]:
        is_safe = file.endswith(".safetensors")
        (save_file if is_safe else torch.save)(make(), folder / file)
        return {"weights": folder / file, **options}

    return Form("checkpoints", name, write, error)


def written(
    name: str, make: Callable[[], bytes], error: str, file: str = "model.pth", **options: Any
) -> Form:
    """A file of these bytes, passed as the weights of ``Small``."""

    def write(folder: Path) -> Mapping[str, Any]:
        (folder / file).write_bytes(make())
        return {"weights": folder / file, **options}

    return Form("other files", name, write, error)


def bytes_of(value: Any, **options: Any) -> bytes:
    """Returns what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def cut(data: bytes) -> bytes:
    return data[: len(data) * 3 // 4]


def old_format(folder: Path) -> Mapping[str, Any]:
    torch.save(state(), folder / "model.pth", _use_new_zipfile_serialization=False)
    return {"weights": folder / "model.pth"}


def from_gpu(folder: Path) -> Mapping[str, Any]:
    with mock.patch("torch.serialization.location_tag", return_value="cuda:3"):
        torch.save(state(), folder / "model.pth")
    assert b"cuda:3" in (folder / "model.pth").read_bytes()
    return {"weights": folder / "model.pth"}


def script(folder: Path, compile: Callable[[nn.Module], Any]) -> Mapping[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(compile(trained()), folder / "model.pt")
    return {"weights": folder / "model.pt"}


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, torch.zeros(1, 3, 32, 32))


def frozen(model: nn.Module) -> Any:
    return torch.jit.freeze(torch.jit.script(model))


def shards(folder: Path, suffix: str = "safetensors") -> Path:
    """Writes two shards, and returns their index."""
    tensors, names = state(), (f"model-0000{n}-of-00002.{suffix}" for n in (1, 2))
    index: dict[str, str] = {}
    for name, part in zip(names, (lambda k: k < "f", lambda k: k >= "f"), strict=True):
        shard = {key: tensor for key, tensor in tensors.items() if part(key)}
        (save_file if suffix == "safetensors" else torch.save)(shard, folder / name)
        index |= dict.fromkeys(shard, name)
    path = folder / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return path


def sharded(folder: Path, suffix: str) -> Mapping[str, Any]:
    return {"weights": shards(folder, suffix)}


def missing_shard(folder: Path) -> Mapping[str, Any]:
    index = shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return {"weights": index}


def foreign_shard(folder: Path) -> Mapping[str, Any]:
    index = shards(folder)
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    return {"weights": index}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serves a folder on loopback, and yields its URL."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def web(folder: Path) -> Mapping[str, Any]:
    torch.save(state(), folder / "model.pth")
    stack = contextlib.ExitStack()
    url = stack.enter_context(web_server(folder))
    return {"weights": f"{url}/model.pth", "_close": stack.close}


def npz() -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in state().items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.pth", bytes_of(state()))
    return buffer.getvalue()


def exported_program() -> bytes:
    buffer = io.BytesIO()
    shapes = ({0: torch.export.Dim("n")},)
    example = (torch.zeros(2, 3, 32, 32),)
    torch.export.save(torch.export.export(trained(), example, dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


def is_folder(folder: Path) -> Mapping[str, Any]:
    torch.save(state(), folder / "model.pth")
    return {"weights": folder}


def counted() -> State:
    """As after a profile of thop."""
    counters = {f"{name}total_ops": torch.zeros(1, dtype=torch.float64) for name in ("", "fc.")}
    return {**state(), **counters}


def positions(folder: Path) -> Mapping[str, Any]:
    """A Vision Transformer that was trained for another input size."""
    tensors = tiny_vit().state_dict()
    tensors["encoder.pos_embedding"] = torch.zeros(1, 50, 16)
    torch.save(tensors, folder / "vit.pth")
    return {"model": "tiny_vit", "weights": folder / "vit.pth"}


def settings() -> dict[str, Any]:
    """What training scripts store beside the weights."""
    tasks: Any = collections.defaultdict(list)
    tasks["a"].append(1)
    return {
        "state_dict": collections.OrderedDict(state()),
        "args": argparse.Namespace(lr=0.1, output=Path("runs")),
        "best": np.float64(0.5),
        "accuracies": np.array([0.5, 0.6]),
        "dtype": np.dtype("float32"),
        "version": torch.__version__,
        "when": datetime.datetime(2026, 11, 29),
        "rng": np.random.RandomState(0).get_state(),
        "tasks": tasks,
        "recent": collections.deque([1, 2], maxlen=2),
        "dtypes": {torch.float16, torch.bfloat16},
        "sizes": {3: torch.Size([2]), None: frozenset([1]), (1, 2): slice(1, 2)},
    }


def trainer() -> dict[str, Any]:
    """A checkpoint with the state of the optimizer, which holds tensors of the same shapes."""
    model = copy.deepcopy(trained())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "epoch": 3,
        "model_state_dict": state(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "loss": torch.tensor(0.3),
    }


def averaged() -> dict[str, Any]:
    from torch.optim.swa_utils import AveragedModel

    return AveragedModel(trained(), use_buffers=True).state_dict()


def tied() -> State:
    """Two tensors that share their memory, one of them transposed."""
    tensors = state()
    flat = torch.zeros(80)
    flat[:40] = tensors["fc.weight"].T.reshape(-1)
    tensors["fc.weight"] = flat[:40].view(8, 5).T
    tensors["fc.bias"] = flat[40:45].copy_(tensors["fc.bias"])
    return tensors


def quantized() -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        ones = torch.quantize_per_tensor(torch.ones(5, 8), 1, 0, torch.qint8)
    return {**state(), "fc.weight": ones}


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code was run",)


def safe_bytes() -> bytes:
    from safetensors.torch import save

    return save(state())


OTHER = functools.partial(state, seed=2)
BARE = saved("`torch.save(model.state_dict(), path)`", state)

FORMS: list[Form] = [
    BARE,
    saved("the same as `.safetensors`", state, file="model.safetensors"),
    saved("the same as `.ckpt`, `.bin` or `.pth.tar`", state, file="model.pth.tar"),
    Form("checkpoints", "the same in PyTorch's format before 1.6", old_format),
    Form("checkpoints", "the same with tensors of a GPU", from_gpu),
    saved(
        "with `nn.Parameter` values",
        lambda: {k: nn.Parameter(v, False) for k, v in state().items()},
    ),
    saved("in float64", lambda: {k: v.double() for k, v in state().items()}),
    saved("with tensors that are transposed, or share their memory", tied),
    saved(
        "without `num_batches_tracked`, as before PyTorch 0.4.1",
        lambda: {k: v for k, v in state().items() if not k.endswith("tracked")},
    ),
    saved("under `state_dict`", lambda: {"state_dict": state(), "epoch": 3}),
    saved("under `model`, `net`, `weights` or `params`", lambda: {"net": state()}),
    saved("in deeper dictionaries", lambda: {"run": {"last": {"model": state()}}}),
    saved("in a list or tuple", lambda: (3, [state()])),
    saved("with the state of an optimizer", trainer),
    saved("with an `argparse.Namespace`, paths, dates, NumPy scalars and arrays", settings),
    saved("of DeepSpeed, under `module`", lambda: {"module": state(), "dp_world_size": 2}),
    saved(
        "timm's `state_dict` and `state_dict_ema`: the second",
        lambda: {"state_dict": OTHER(), "state_dict_ema": state()},
    ),
    saved("`model` and `model_ema`: the second", lambda: {"model": OTHER(), "model_ema": state()}),
    saved(
        "MMEngine's `state_dict` and `ema_state_dict`: the first, which is the average",
        lambda: {
            "meta": {"mmengine_version": "0.10.5"},
            "state_dict": under("backbone."),
            "ema_state_dict": {**under("module.backbone.", OTHER()), "steps": torch.tensor(9)},
        },
    ),
    saved(
        "`ema` under `module`: the average",
        lambda: {"model": OTHER(), "ema": {"module": state(), "decay": 0.99}},
    ),
    saved(
        "`student` and `teacher`: the second",
        lambda: {"student": under("module.", OTHER()), "teacher": under("backbone.")},
    ),
    saved("of `AveragedModel`, with `n_averaged`", averaged),
    saved(
        "two sets of weights without such a name: the first, with a warning",
        lambda: {**under("encoder_q."), **under("encoder_k.", OTHER())},
    ),
    saved("the prefix `module.` of `DataParallel`", lambda: under("module.")),
    saved("the prefix `_orig_mod.` of `torch.compile`", lambda: under("_orig_mod.")),
    saved(
        "`_fsdp_wrapped_module.` within the keys",
        lambda: inside("layer1.", "_fsdp_wrapped_module."),
    ),
    saved(
        "`module.` within the keys, where a part was parallel", lambda: inside("layer1.", "module.")
    ),
    saved(
        "of Lightning: `model.` under `state_dict`, and a loss",
        lambda: {
            "state_dict": {**under("model."), "loss.weight": torch.ones(5)},
            "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        },
        file="last.ckpt",
    ),
    saved("`model._orig_mod.module.`", lambda: under("model._orig_mod.module.")),
    saved("any other prefix", lambda: under("my.own.encoder.")),
    saved(
        "a backbone beside a projector",
        lambda: {**under("backbone.", without("fc")), **projector()},
    ),
    saved(
        "a backbone for a model that has it under `backbone.`", lambda: without("fc"), model=wrapped
    ),
    saved(
        "another prefix than the model's", lambda: under("encoder.", without("fc")), model=wrapped
    ),
    saved(
        "fine-tuned, with 10 classes in place of 5",
        lambda: {**state(), **{k: v for k, v in state(10).items() if k.startswith("fc")}},
    ),
    saved("without a classifier", lambda: without("fc")),
    saved("without a classifier, with a projector", lambda: {**without("fc"), **projector()}),
    saved(
        "with another classifier, of several layers",
        lambda: {**without("fc"), "fc.0.weight": torch.ones(4, 8), "fc.2.weight": torch.ones(5, 4)},
    ),
    saved("with the counters of thop", counted),
    Form("checkpoints", "TorchScript, scripted", lambda f: script(f, torch.jit.script)),
    Form("checkpoints", "TorchScript, traced", lambda f: script(f, traced)),
    Form(
        "checkpoints",
        "shards, by their `model.safetensors.index.json`",
        lambda f: sharded(f, "safetensors"),
    ),
    Form(
        "checkpoints",
        "shards, by their `pytorch_model.bin.index.json`",
        lambda f: sharded(f, "bin"),
    ),
    Form("checkpoints", "a URL: `https://`, `s3://`, `gs://`, `az://`", web),
    saved(
        'fine-tuned, with 10 classes, for `layer="logits"`',
        lambda: state(10),
        "layer='pooled' does not need the classifier",
        layer="logits",
    ),
    saved(
        "without buffers",
        lambda: {k: v for k, v in state().items() if "running" not in k},
        "running_mean (8,) is not in the file",
    ),
    saved(
        "of another width",
        lambda: {**state(), "conv.weight": torch.ones(16, 3, 5, 5)},
        "conv.weight is (16, 3, 5, 5) in the file, (8, 3, 5, 5) in the model",
    ),
    saved(
        "with parts that the model lacks",
        lambda: {**state(), "layer1.se.weight": torch.ones(8)},
        "the model lacks layer1.se.weight (8,) of the file",
    ),
    saved(
        "of another model", lambda: under("encoder.", {"stem.weight": torch.ones(3)}), "0 of 14 fit"
    ),
    Form(
        "checkpoints",
        "a Vision Transformer for another input size",
        positions,
        "pos_embedding is (1, 50, 16) in the file, (1, 17, 16) in the model",
    ),
    saved(
        "a LoRA adapter",
        lambda: {
            "base_model.model.fc.lora_A.weight": torch.ones(2, 8),
            "base_model.model.fc.lora_B.weight": torch.ones(5, 2),
        },
        "contains an adapter",
        file="adapter_model.safetensors",
    ),
    saved("quantized tensors", quantized, "fc.weight is quantized in the file", layer="logits"),
    saved(
        "sparse tensors",
        lambda: {**state(), "conv.weight": state()["conv.weight"].to_sparse()},
        "conv.weight is sparse in the file",
    ),
    saved(
        "tensors on the meta device",
        lambda: {k: v.to("meta") for k, v in state().items()},
        "is on the meta device in the file",
    ),
    saved(
        "int8 weights",
        lambda: {**state(), "conv.weight": torch.ones(8, 3, 5, 5, dtype=torch.int8)},
        "conv.weight is torch.int8 in the file, torch.float32 in the model",
    ),
    Form("checkpoints", "TorchScript, frozen", lambda f: script(f, frozen), "no state_dict"),
    Form("checkpoints", "an index with a missing shard", missing_shard, "no such file"),
    Form(
        "checkpoints",
        "an index with a shard in another folder",
        foreign_shard,
        "not a file beside it",
    ),
    saved(
        "a pickled module, `torch.save(model, path)`",
        trained,
        "pickled module (tests.models.forms.Small)",
    ),
    saved("a pickled module in a dictionary", lambda: {"model": trained()}, "pickled module"),
    saved(
        "with an object of a class of the script",
        lambda: {"state_dict": state(), "cfg": Settings()},
        "Python objects (tests.models.forms.Settings)",
    ),
    saved(
        "with classes of PyTorch among the hyperparameters",
        lambda: {"state_dict": state(), "norm": functools.partial(nn.LayerNorm, eps=1e-6)},
        "Python objects (functools.partial, torch.nn.modules.normalization.LayerNorm)",
    ),
    saved(
        "with code", lambda: {"state_dict": state(), "cfg": Code()}, "Python objects (posix.mkdir)"
    ),
    saved("without tensors", lambda: {"epoch": 3, "path": "a"}, "no state_dict"),
    written("`pickle.dump(state_dict)`", lambda: pickle.dumps(state(), 2), "by pickle"),
    written(
        "`pickle.dump` of NumPy arrays, as of Detectron2",
        lambda: pickle.dumps({"model": {k: v.numpy() for k, v in state().items()}}, 4),
        "by pickle",
    ),
    written(
        "another `pickle_protocol`", lambda: bytes_of(state(), pickle_protocol=4), "pickle_protocol"
    ),
    written("a file that ends early", lambda: cut(bytes_of(state())), "ends early"),
    written(
        "an old file that ends early",
        lambda: cut(bytes_of(state(), _use_new_zipfile_serialization=False)),
        "ends early",
    ),
    written(
        "a `.safetensors` file that ends early",
        lambda: cut(safe_bytes()),
        "ends early",
        file="model.safetensors",
    ),
    written("an empty file", bytes, "is empty"),
    written("a file of zeros", lambda: bytes(4096), "zeros"),
    written(
        "a web page, saved in place of the file",
        lambda: b"\n<!DOCTYPE html><html></html>",
        "web page",
    ),
    written("the error of a store", lambda: b"<?xml version='1.0'?><Error/>", "XML"),
    written(
        "a Git LFS pointer",
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        "git lfs pull",
        file="model.safetensors",
    ),
    written("`config.json`", lambda: b'{"model_type": "vit"}', "is JSON", file="config.json.bin"),
    written(
        "an ONNX file", lambda: b"\x08\x09\x12\x07pytorch", "is an ONNX model", file="model.bin"
    ),
    written("`tf_model.h5`", lambda: b"\x89HDF\r\n\x1a\n", "HDF5", file="tf_model.h5.bin"),
    written("`flax_model.msgpack`", lambda: b"\x81\xa6params\x80", "msgpack", file="flax.bin"),
    written("a `.npz` file", npz, "NumPy"),
    written("a `.tar.gz` file", lambda: gzip.compress(b"weights"), "compressed"),
    written("a zip archive", zipped, "unpack it"),
    written("a `.pt2` file", exported_program, "pass a .pt2 file as model"),
    Form("other files", "a folder", is_folder, "is a folder"),
    Form(
        "other files",
        "a file that does not exist",
        lambda f: {"weights": f / "none.pth"},
        "no such file",
    ),
]

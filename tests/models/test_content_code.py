"""Which edits of a factory's code change its digest."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import random
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from imagevec.models.content import code_digest
from tests.helpers.factories import Tiny

MODEL = '''\
import enum
import functools
import logging
import os
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import own.helpers
from own import layers
from own.helpers import double

SCALE = 2.0
TABLE = torch.tensor([1.0, 2.0])
ACTIVATIONS = {"relu": torch.relu, "twice": lambda x: 2 * x}
NAMES = {"one", "two", "three"}
HERE = Path(__file__).parent
FOLDER = os.path.dirname(__file__)
logger = logging.getLogger(__name__)
calls = 0
cache = {}


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


@dataclass
class Config:
    width: int = 8
    kernel: int = 5
    extra: list = field(default_factory=list)


Size = namedtuple("Size", ["height", "width"], defaults=[1])


def unrelated(x):
    return x - 1


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) * 3

    return wrapper


@functools.lru_cache
def cached(x):
    return x + 10


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x


def hook(module, args, output):
    return output + 1


class Base(nn.Module):
    power = 2

    def finish(self, x):
        """Raises to a power."""
        return x**self.power


class Net(Base):
    def __init__(self, config, slope=0.1, mode=Mode.FAST):
        super().__init__()
        self.conv = nn.Conv2d(3, config.width, config.kernel, stride=4)
        self.norm = nn.BatchNorm2d(config.width, eps=1e-5)
        self.fc = nn.Linear(config.width, 5)
        self.config = config
        self.slope = slope
        self.mode = mode
        self.act = nn.GELU()
        self.size = Size(2)
        self.register_buffer("table", torch.arange(4) / 7, persistent=False)

    @decorated
    def forward(self, x):
        global calls
        calls += 1
        cache[x.shape] = calls
        logger.info("forward of %s", FOLDER)
        x = F.leaky_relu(self.norm(self.conv(x)), self.slope)
        x = ACTIVATIONS["relu"](x) + self.table.sum() + TABLE.sum() + len(NAMES)

        def nested(y):
            return y + 0.5

        x = layers.block(own.helpers.half(double(nested(x)))) * SCALE
        x = cached(Square.apply(self.act(x)))
        from own import lazy

        return self.finish(self.fc(lazy.late(x).mean((2, 3))))


def factory(width=8, *, kernel=5):
    torch.set_printoptions(precision=4)
    model = Net(Config(width, kernel))
    model.register_forward_hook(hook)
    (lambda: (HERE / "none").exists())()
    return model


make = functools.partial(factory, kernel=5)
'''

HELPERS = """\
FACTOR = 2


def double(x):
    return x * FACTOR


def half(x):
    return x / 2


def unrelated(x):
    return x
"""

LAYERS = """\
from .lazy import offset


def block(x):
    return x + offset
"""

LAZY = """\
offset = 1


def late(x):
    return x + 3
"""

FILES = {
    "model": MODEL,
    "own/__init__": "",
    "own/helpers": HELPERS,
    "own/layers": LAYERS,
    "own/lazy": LAZY,
}


@contextlib.contextmanager
def imported(folder: Path, files: dict[str, str]) -> Iterator[Any]:
    """Writes files in a new folder and imports ``model``."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module("model")
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in ("model", "own")]:
            del sys.modules[name]


def digest(factory: Callable[[], nn.Module]) -> str:
    return code_digest(factory, factory())


def digest_of_files(folder: Path, files: dict[str, str]) -> str:
    with imported(folder, files) as model:
        return digest(model.make)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest_of_files(tmp_path_factory.mktemp("original"), FILES)


def edited(file: str, old: str, new: str) -> dict[str, str]:
    assert FILES[file].count(old) == 1, old
    return {**FILES, file: FILES[file].replace(old, new)}


CHANGES = [
    ("model", "SCALE = 2.0", "SCALE = 3.0"),
    ("model", "torch.tensor([1.0, 2.0])", "torch.tensor([1.0, 2.5])"),
    ("model", '"relu": torch.relu', '"relu": torch.sigmoid'),
    ("model", "lambda x: 2 * x", "lambda x: 3 * x"),
    ("model", '"three"}', '"four"}'),
    ("model", "FAST = 1", "FAST = 3"),
    ("model", "mode=Mode.FAST", "mode=Mode.SLOW"),
    ("model", "slope=0.1", "slope=0.2"),
    ("model", "self.slope = slope", "self.slope = slope * 2"),
    ("model", "F.leaky_relu(self.norm(self.conv(x)), self.slope)", "F.relu(self.norm(self.conv(x)))"),
    ("model", "function(*args) * 3", "function(*args) * 4"),
    ("model", "    @decorated\n", ""),
    ("model", "return x + 10", "return x + 11"),
    ("model", "return x * x", "return x + x"),
    ("model", "return output + 1", "return output + 2"),
    ("model", "model.register_forward_hook(hook)", "model.register_forward_pre_hook(hook)"),
    ("model", "    model.register_forward_hook(hook)\n", ""),
    ("model", "power = 2", "power = 3"),
    ("model", "x**self.power", "x**-self.power"),
    ("model", "stride=4", "stride=2"),
    ("model", "eps=1e-5", "eps=1e-6"),
    ("model", "nn.GELU()", "nn.SiLU()"),
    ("model", "nn.GELU()", 'nn.GELU("tanh")'),
    ("model", "Size(2)", "Size(3)"),
    ("model", "defaults=[1]", "defaults=[2]"),
    ("model", "torch.arange(4) / 7", "torch.arange(4) / 8"),
    ("model", "torch.arange(4) / 7", "torch.arange(4)"),
    ("model", "return y + 0.5", "return y + 0.25"),
    ("model", "len(NAMES)", "len(NAMES) + 1"),
    ("model", "own.helpers.half(double", "own.helpers.double(double"),
    ("model", "def factory(width=8, *, kernel=5)", "def factory(width=8, *, kernel=5, more=1)"),
    ("model", "def factory(width=8,", "def factory(width=9,"),
    ("model", "functools.partial(factory, kernel=5)", "functools.partial(factory, kernel=7)"),
    ("model", "functools.partial(factory, kernel=5)", "factory"),
    ("model", "import cached\n", "") if False else ("model", "class Net(Base)", "class Net(nn.Module, Base)")
    if False
    else ("model", "self.fc(lazy", "self.fc(-lazy"),
    ("model", "precision=4", "precision=5"),
    ("model", "from own.helpers import double", "from own.helpers import half as double"),
    ("own/helpers", "FACTOR = 2", "FACTOR = 3"),
    ("own/helpers", "x * FACTOR", "x + FACTOR"),
    ("own/helpers", "x / 2", "x // 2"),
    ("own/layers", "x + offset", "x - offset"),
    ("own/lazy", "offset = 1", "offset = 2"),
    ("own/lazy", "x + 3", "x + 4"),
]


@pytest.mark.parametrize(("file", "old", "new"), CHANGES)
def test_edit_changes_digest(file: str, old: str, new: str, original: str, tmp_path: Path) -> None:
    assert digest_of_files(tmp_path, edited(file, old, new)) != original


SAME = [
    ("model", "x = F.leaky_relu(", "# a comment\n        x = F.leaky_relu("),
    ("model", '"""Raises to a power."""', '"""Another docstring."""'),
    ("model", "x**self.power", "(\n            x ** self.power\n        )"),
    ("model", "def finish(self, x):", "def finish(self, x: torch.Tensor) -> torch.Tensor:"),
    ("model", "import enum\n", '"""A docstring."""\n\nimport enum\nimport json\n\n\n'),
    ("model", "return x - 1", "return x - 2"),
    ("model", "def unrelated(x)", "def another(x)"),
    ("model", '{"one", "two", "three"}', '{"three", "two", "one"}'),
    ("model", "calls = 0", "calls = 5"),
    ("model", "cache = {}", "cache = {(1, 3): 1}"),
    ("model", "    power = 2\n", "    power: int = 2\n"),
    ("model", "FAST = 1\n    SLOW = 2", "FAST = 1  # fast\n    SLOW = 2"),
    ("own/helpers", "return x\n", "return x + 1\n"),
    ("own/__init__", "", "unrelated = 1\n"),
    ("own/lazy", "offset = 1\n", "unrelated = 1\noffset = 1\n"),
]


@pytest.mark.parametrize(("file", "old", "new"), SAME)
def test_edit_keeps_digest(file: str, old: str, new: str, original: str, tmp_path: Path) -> None:
    assert digest_of_files(tmp_path, edited(file, old, new)) == original


def test_digest_is_the_same_in_other_processes(original: str, tmp_path: Path) -> None:
    """With another hash seed, as ``__main__`` and as a module, and after a forward pass."""
    code = (
        "\nfrom imagevec.models.content import code_digest\n"
        "print(code_digest(make, make()))\n"
        "make().eval()(torch.zeros(1, 3, 32, 32))\n"
        "print(code_digest(make, make()))\n"
    )
    with imported(tmp_path, {**FILES, "script": MODEL + code}):
        pass
    (tmp_path / "importing.py").write_text("import torch\nfrom model import make" + code)
    for script, seed in (("script", "1"), ("importing", "2")):
        done = subprocess.run(
            [sys.executable, f"{script}.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [original, original]

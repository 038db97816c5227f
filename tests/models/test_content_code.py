"""Which edits of a factory's code change its digest."""

from __future__ import annotations

import contextlib
import functools
import importlib
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

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")

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
    forget_modules()  # other tests have modules of these names
    try:
        yield importlib.import_module("model")
    finally:
        sys.path.remove(str(folder))
        forget_modules()


def forget_modules() -> None:
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
    ("model", "F.leaky_relu(self.norm(self.conv(x)), self.slope)", "F.relu(self.conv(x))"),
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
    ("model", "self.fc(lazy", "self.fc(-lazy"),
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


def test_digest_is_the_same_in_all_processes(tmp_path: Path) -> None:
    """With another hash seed, as ``__main__`` and as a module, and after a forward pass."""
    code = (
        "\nfrom imagevec.models.content import code_digest\n"
        "print(code_digest(make, make()))\n"
        "make().eval()(torch.zeros(1, 3, 32, 32))\n"
        "print(code_digest(make, make()))\n"
    )
    with imported(tmp_path, {**FILES, "script": MODEL + code}) as model:
        digests = {digest(model.make)}
    another = "class Another(torch.autograd.Function): ...\n"  # PyTorch numbers them
    (tmp_path / "importing.py").write_text(f"import torch\n{another}from model import make{code}")
    for script, seed in (("script", "1"), ("importing", "2")):
        done = subprocess.run(
            [sys.executable, f"{script}.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.update(done.stdout.split())
    assert len(digests) == 1


class Net(Tiny):
    """Has attributes that each test sets."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Doubling(nn.Linear):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) * 2


class Scaling(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.scale


@torch.no_grad()
def plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@torch.no_grad()
def plus_two(x: torch.Tensor) -> torch.Tensor:
    return x + 2


def having(value: object) -> Callable[[], nn.Module]:
    return lambda: Net(value=value)


def changed(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        model = Tiny()
        change(model)
        return model

    return factory


def parametrized(make: Callable[[], nn.Module], scale: float) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        model = Tiny()
        model.fc = make()  # type: ignore[assignment]
        nn.utils.parametrize.register_parametrization(model.fc, "weight", Scaling(scale))
        return model

    return factory


def add_one(x):
    return x + 1


def add_two(x):
    return x + 2


def built_with_script(function: Any) -> Callable[[], nn.Module]:
    return lambda: Net(value=torch.jit.script(function))


def scaling(scale: float, wrap: Any) -> Callable[[], nn.Module]:
    return lambda: wrap(Scaling(float(scale)))


def built(model: Callable[[], nn.Module], wrap: Any) -> Callable[[], nn.Module]:
    return lambda: wrap(model())


def buffer(model: nn.Module, value: torch.Tensor) -> None:
    model.register_buffer("table", value, persistent=False)


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, torch.zeros(1, 3, 8, 8))


SINES = torch.arange(1000.0).sin()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (having(1), having(2)),
        (having(torch.ones(3)), having(torch.zeros(3))),
        (having(torch.ones(3)), having(torch.ones(3, dtype=torch.float16))),
        (having([nn.Linear(2, 2)]), having([nn.ReLU()])),
        (having(np.ones(3)), having(np.zeros(3))),
        (having(OrderedDict(a=1, b=2)), having(OrderedDict(b=2, a=1))),
        (having(torch.relu), having(torch.sigmoid)),
        (having(nn.functional.relu), having(nn.functional.gelu)),
        (having(nn.functional.max_pool2d), having(nn.functional.max_pool1d)),
        (having(torch.ops.aten.relu), having(torch.ops.aten.sigmoid)),
        (having(np.add), having(np.subtract)),
        (having(nn.ReLU), having(nn.GELU)),
        (having(plus_one), having(plus_two)),
        (having(functools.lru_cache(plus_one)), having(functools.lru_cache(plus_two))),
        (
            lambda: Net(value=torch.jit.script(add_one)),
            lambda: Net(value=torch.jit.script(add_two)),
        ),
        (having("relu"), having("gelu")),
        (having(torch.float16), having(torch.float32)),
        (Tiny, changed(lambda model: model.half())),
        (Tiny, changed(lambda model: model.conv.register_forward_hook(lambda m, i, o: -o))),
        (Tiny, changed(lambda model: setattr(model.conv, "stride", (2, 2)))),
        (Tiny, changed(lambda model: setattr(model, "forward", model.conv.forward))),
        (changed(lambda m: buffer(m, SINES)), changed(lambda m: buffer(m, SINES.cos()))),
        (changed(lambda m: buffer(m, SINES)), changed(lambda m: buffer(m, 1.001 * SINES))),
        (changed(lambda m: buffer(m, SINES)), changed(lambda m: buffer(m, SINES.flip(0)))),
        (parametrized(lambda: nn.Linear(8, 5), 1), parametrized(lambda: nn.Linear(8, 5), 2)),
        (parametrized(lambda: nn.Linear(8, 5), 1), parametrized(lambda: Doubling(8, 5), 1)),
        (
            scaling(1, torch.jit.script),
            built(lambda: Scaling(2.0), torch.jit.script),
        ),
        (built(Tiny, traced), built(lambda: nn.Sequential(Tiny(), nn.ReLU()), traced)),
        (scaling(1, torch.fx.symbolic_trace), scaling(2, torch.fx.symbolic_trace)),
        (scaling(1, torch.compile), scaling(2, torch.compile)),
    ],
)
def test_other_modules_have_other_digests(
    first: Callable[[], nn.Module], second: Callable[[], nn.Module]
) -> None:
    def digest_of_module(factory: Callable[[], nn.Module]) -> str:
        return code_digest(Tiny, factory())

    assert digest_of_module(first) != digest_of_module(second)


@pytest.mark.parametrize(
    "make",
    [
        Tiny,  # with other random weights
        lambda: Net(lock=threading.Lock()),
        lambda: Net(event=threading.Event()),
        lambda: Net(generator=torch.Generator(), other=np.random.default_rng()),
        lambda: Net(random=random.Random()),
        lambda: Net(logger=logging.getLogger(str(random.random()))),
        lambda: Net(path=Path(str(random.random()))),
        lambda: Net(tensor=torch.eye(3).to_sparse()),
        lambda: Net(none=None, empty={}),
        changed(lambda model: nn.utils.parametrizations.weight_norm(model.fc)),
        changed(lambda model: buffer(model, SINES * (1 + 1e-7 * torch.randn(1000)))),
        changed(lambda model: model.register_forward_hook(lambda module, args, output: output)),
        scaling(1, torch.jit.script),
        built(Tiny, traced),
        built(Tiny, torch.fx.symbolic_trace),
        built(Tiny, torch.compile),
    ],
)
def test_what_does_not_determine_vectors_has_the_same_digest(
    make: Callable[[], nn.Module],
) -> None:
    assert code_digest(Tiny, make()) == code_digest(Tiny, make())


def test_attributes_that_libraries_leave_unset_keep_the_digest() -> None:
    assert code_digest(Tiny, Tiny()) == code_digest(Tiny, built(Tiny, with_unset_attributes)())


def with_unset_attributes(model: Any) -> Any:
    model.conv.new_in_this_version = None
    model.conv.pretrained_cfg = {"url": "https://..."}
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_computed_weights_keep_the_digest() -> None:
    normed = changed(lambda model: nn.utils.weight_norm(model.fc))
    assert code_digest(Tiny, normed()) == code_digest(Tiny, normed())


class OtherLogger(logging.Logger):
    """Libraries replace the class of new loggers, as NNCF does when it is imported."""


def test_the_class_of_a_logger_does_not_count() -> None:
    first, second = Net(logger=logging.Logger("a")), Net(logger=OtherLogger("a"))
    assert code_digest(Tiny, first) == code_digest(Tiny, second)


def test_long_chain_of_objects_has_a_digest() -> None:
    chain: list[Any] = []
    for _ in range(5000):
        chain = [chain]
    assert code_digest(Tiny, Net(chain=chain)) == code_digest(Tiny, Net(chain=chain))


def test_installed_package_of_factory_counts(tmp_path: Path) -> None:
    """Of other installed packages, only names count."""
    library = "from torch import nn\n\n\nclass Last(nn.Identity):\n    {}\n"
    package = (
        "from torch import nn\n\nfrom own_library import Last\n\n__version__ = '1'\n\n\n"
        "class Net(nn.Identity):\n    scale = {}\n\n\n"
        "def factory():\n    return nn.Sequential(Net(), Last())\n"
    )
    digests = []
    for number, (scale, last) in enumerate(((1, "pass"), (2, "pass"), (1, "scale = 2"))):
        folder = tmp_path / str(number) / "site-packages"
        files = {"model": package.format(scale), "own_library": library.format(last)}
        files["own_library"] = "__version__ = '1'\n" + files["own_library"]
        with imported(folder, files) as model:
            digests.append(digest(model.factory))
        del sys.modules["own_library"]
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]


def test_code_without_a_source_is_known_by_its_bytecode() -> None:
    def made(text: str) -> Callable[[], nn.Module]:
        scope: dict[str, Any] = {"Tiny": Tiny}
        exec(text, scope)
        return scope["factory"]

    text = "def factory():\n    model = Tiny()\n    model.scale = {}\n    return model\n"
    digests = [digest(made(text.format(scale))) for scale in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]

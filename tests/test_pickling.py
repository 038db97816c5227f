"""What functions capture, and how they are pickled."""

from __future__ import annotations

import functools
import importlib
import io
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torchvision
from pyspark import SparkContext
from pyspark.sql import DataFrame, SparkSession
from torch import nn

from imagevec import ImageVectorizer, SerializationError, explain_pickle, register_model
from imagevec.models.factory import FactorySource
from imagevec.pickling import check_pickle, dumps, is_installed, loads
from tests.helpers.factories import tiny
from tests.helpers.pipeline import run_python
from tests.helpers.shared import ROOT

logger = logging.getLogger(__name__)
logger.addHandler(logging.StreamHandler())


def hollow(cls: type) -> Any:
    """An object of a Spark class, without the JVM behind it."""
    return object.__new__(cls)


class Article:
    """Holds what it must not."""

    def __init__(self, **held: object) -> None:
        self.__dict__.update(held)

    def factory(self) -> Callable[[], object]:
        def factory() -> object:
            return self

        return factory

    def method(self) -> object:
        return self


@pytest.mark.parametrize(
    ("make", "kind", "fix"),
    [
        (lambda: hollow(SparkSession), "SparkSession", "not an attribute of self"),
        (lambda: hollow(SparkContext), "SparkContext", "create it on the driver"),
        (lambda: hollow(DataFrame), "DataFrame", "collect what the function needs"),
        (threading.Lock, "lock", "create it where it is used, on the worker"),
        (threading.RLock, "lock", "create it where it is used, on the worker"),
        (lambda: nn.Linear(2, 2), "nn.Module", "return it from a function"),
    ],
)
def test_a_captured_object_is_named_with_its_way_and_its_fix(
    make: Callable[[], object], kind: str, fix: str
) -> None:
    with pytest.raises(SerializationError) as raised:
        check_pickle(Article(spark=make()).factory())
    assert f"factory.__closure__[0] -> self.spark is a {kind}" in str(raised.value)
    assert fix in str(raised.value)


def test_an_open_file_is_named(tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w") as file,
        pytest.raises(SerializationError, match="open file: pass its path"),
    ):
        check_pickle(Article(log=file).method)


def test_a_broadcast_is_named() -> None:
    from pyspark import Broadcast

    with pytest.raises(SerializationError, match=r"fn?.*is a Broadcast: load the value"):
        check_pickle(Article(weights=hollow(Broadcast)).method)


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda spark: Article(spark=spark).method, "fn.__self__.spark"),
        (lambda spark: functools.partial(print, [spark]), "fn.args[0][0]"),
        (lambda spark: functools.partial(print, end={"s": spark}), "fn.keywords['end']['s']"),
        (lambda spark: lambda x=spark: x, "fn.__defaults__[0]"),
        (lambda spark: lambda *, x=spark: x, "fn.__kwdefaults__['x']"),
    ],
)
def test_the_way_to_a_session_is_named(wrap: Callable[[object], Any], path: str) -> None:
    (problem,) = explain_pickle(wrap(hollow(SparkSession))).problems
    assert (problem.path, problem.kind) == (path, "SparkSession")


def test_a_global_is_captured_only_by_its_name_alone() -> None:
    scope: dict[str, Any] = {"spark": hollow(SparkSession), "__name__": "__main__"}
    exec("def uses(): return spark", scope)
    exec("def has_attribute_of_that_name(x): return x.spark", scope)
    (problem,) = explain_pickle(scope["uses"]).problems
    assert problem.path == "fn.__globals__['spark']"
    assert explain_pickle(scope["has_attribute_of_that_name"]).problems == ()


def test_what_says_how_it_is_pickled_is_not_looked_into() -> None:
    held = logger  # has handlers with locks and streams, and is pickled by its name

    def factory() -> object:
        return held

    assert explain_pickle(factory).problems == ()
    check_pickle(factory)


def test_in_memory_buffers_and_importable_functions_pass() -> None:
    check_pickle(tiny)
    check_pickle(functools.partial(print, io.BytesIO()))


def test_a_cycle_ends() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert explain_pickle(functools.partial(print, loop)).problems == ()


def test_a_large_capture_is_a_warning_with_its_largest_parts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights, labels = b"w" * 2_000_000, b"l" * 100

    def factory() -> object:
        return weights, labels

    check_pickle(factory)
    assert "adds 2,000," in caplog.text
    assert "factory.__closure__[1] -> weights 2,000," in caplog.text
    caplog.clear()
    check_pickle(tiny)
    assert caplog.text == ""


def captures(held: object) -> Callable[[], object]:
    return lambda: held


@pytest.mark.parametrize("size", [50, 5000])
@pytest.mark.parametrize("at", [0, 49, -1])
def test_a_problem_is_found_at_any_place_of_a_container(size: int, at: int) -> None:
    items: list[Any] = list(range(size))
    items[at] = ("a tuple", {"key": hollow(SparkSession)})
    for held in (items, dict(enumerate(items)), tuple(items)):
        (problem,) = explain_pickle(captures(held)).problems
        assert problem.path == f"fn.__closure__[0] -> held[{at % size}][1]['key']"


class Counted:
    """Counts how often it is pickled."""

    count = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        Counted.count += 1
        return Counted, ()


def test_elements_of_a_large_container_are_not_pickled_one_by_one() -> None:
    Counted.count = 0
    report = explain_pickle(captures([(Counted(), number) for number in range(1000)]))
    assert list(report.parts) == ["fn.__closure__[0] -> held"]
    # With the function, with the list, and to learn whether it can be pickled.
    assert Counted.count == 3 * 1000


def test_the_report_reads_well() -> None:
    text = str(explain_pickle(Article(spark=hollow(SparkSession), size=b"x" * 500).method))
    assert "problem: fn.__self__.spark is a SparkSession: create it on the driver" in text
    assert "bytes  fn.__self__.size" in text


def test_features_of_such_a_factory_are_refused() -> None:
    factory: Any = Article(spark=hollow(SparkSession)).factory()
    with pytest.raises(SerializationError, match=r"self\.spark"):
        ImageVectorizer(model=factory)
    with pytest.raises(SerializationError, match=r"self\.spark"):
        register_model("captures_a_session", factory)


SCRIPT = """\
import functools
import threading

import torch
from torch import nn

import own.layers
from own import helpers as h

SCALE = 2.0
lock = threading.Lock()


def doubled(function):
    @functools.wraps(function)
    def wrapper(*args):
        return 2 * function(*args)

    return wrapper


class Base(nn.Module):
    power = h.POWER

    def finish(self, x):
        return x**self.power


class Net(Base):
    @doubled
    def forward(self, x):
        import own.lazy
        from late import later

        return later(own.lazy.late(self.finish(own.layers.block(x)))) * SCALE


def factory():
    class Inner(Net):
        offset = SCALE

        def forward(self, x):
            return super().forward(x) + self.offset

    return Inner()


def by_name():
    return getattr(own.layers, "Block")()


def by_computed_name():
    return getattr(own.layers, "".join(["Bl", "ock"]))()


def with_lock():
    with lock:
        return Net()


def dynamic():
    import importlib

    return importlib.import_module("own" + ".dynamic").Net()
"""
FILES = {
    "script": SCRIPT,
    "late": "from own import layers\n\n\ndef later(x):\n    return layers.block(x) + 1\n",
    "own/__init__": "",
    "own/helpers": "POWER = 3\n",
    "own/layers": (
        "from torch import nn\n\nfrom .helpers import POWER\n\n"
        "later = (x for x in ())  # not the one that is used: it cannot be pickled\n\n\n"
        "def block(x):\n    return x * POWER\n\n\n"
        "class Block(nn.Module):\n    def forward(self, x):\n        return block(x)\n"
    ),
    "own/lazy": "def late(x):\n    return x - 1\n",
    "own/dynamic": "from torch import nn\n\n\nclass Net(nn.Identity): ...\n",
}
LOAD = """
import pickle
from pathlib import Path

import torch

source = pickle.loads(Path({path!r}).read_bytes())
print(source.build(source.preset)(torch.tensor(2.0)).item())
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module beside the script, which workers cannot import."""
    for name, text in FILES.items():
        path = tmp_path / "beside" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "beside")
    yield importlib.import_module("script")
    for name in [name for name in sys.modules if name.split(".")[0] in ("script", "own", "late")]:
        del sys.modules[name]


def loaded(factory: Callable[[], Any], folder: Path, *paths: Path) -> float:
    """Calls the factory and its model in another process."""
    path = folder / "factory.pickle"
    path.write_bytes(cloudpickle.dumps(FactorySource(factory)))
    code = LOAD.format(path=str(path))
    return float(run_python(code, PYTHONPATH=os.pathsep.join([str(ROOT), *map(str, paths)])))


def test_module_beside_the_script_is_pickled_by_value(script: Any, tmp_path: Path) -> None:
    """With other modules that its code names or imports, and as it is in this process."""
    check_pickle(script.factory)
    expected = script.factory()(torch.tensor(2.0)).item()
    assert loaded(script.factory, tmp_path) == expected
    script.own.layers.POWER = 4
    script.Net.power = 2
    assert (
        loaded(script.factory, tmp_path) == script.factory()(torch.tensor(2.0)).item() != expected
    )


@pytest.mark.parametrize("wrap", [functools.partial, lambda factory: lambda: factory()])
def test_module_of_a_captured_factory_is_pickled_by_value(
    wrap: Any, script: Any, tmp_path: Path
) -> None:
    factory = wrap(script.by_name)
    check_pickle(factory)
    assert loaded(factory, tmp_path) == 6


def test_module_on_the_worker_gives_members_whose_names_are_computed(
    script: Any, tmp_path: Path
) -> None:
    assert loaded(script.by_computed_name, tmp_path, tmp_path / "beside") == 6
    with pytest.raises(AssertionError, match="addPyFile"):
        loaded(script.by_computed_name, tmp_path)


def test_module_that_cannot_be_pickled_needs_add_py_file(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SerializationError) as raised:
        check_pickle(script.with_lock)
    assert "workers may lack the module 'script'" in str(raised.value)
    assert "with_lock.__globals__['lock'] is a lock" in str(raised.value)
    assert f"spark.sparkContext.addPyFile({script.__file__!r})" in str(raised.value)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "beside"))
    check_pickle(script.with_lock)
    assert loaded(script.with_lock, tmp_path, tmp_path / "beside") != 0


def test_module_that_was_sent_with_add_py_file_may_be_pickled_by_name(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").rename(tmp_path / "userFiles-1")  # as Spark names its folder
    monkeypatch.syspath_prepend(tmp_path / "userFiles-1")
    check_pickle(script.with_lock)


def test_compiled_module_needs_add_py_file(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.own.layers, "__file__", "/beside/own/layers.so")
    with pytest.raises(SerializationError, match=r"'own.layers' is compiled.*addPyFile"):
        check_pickle(script.factory)


def test_worker_without_an_imported_module_names_the_cure(script: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"No module named 'own.*addPyFile"):
        loaded(script.dynamic, tmp_path)


def test_modules_do_not_stay_registered(script: Any) -> None:
    cloudpickle.register_pickle_by_value(script.own.helpers)
    before = cloudpickle.list_registry_pickle_by_value()
    with ThreadPoolExecutor(4) as pool:
        assert len(set(map(len, pool.map(dumps, [script.factory] * 8)))) == 1
    assert cloudpickle.list_registry_pickle_by_value() == before
    cloudpickle.unregister_pickle_by_value(script.own.helpers)
    assert len(cloudpickle.dumps(script.factory)) < 100  # by name


def test_installed_functions_are_pickled_by_name() -> None:
    assert len(dumps(torchvision.models.resnet18)) < 150
    assert loads(dumps(torchvision.models.resnet18)) is torchvision.models.resnet18


def test_globals_in_bodies_of_classes_are_captured() -> None:
    scope: dict[str, Any] = {"spark": hollow(SparkSession), "__name__": "__main__"}
    exec("def factory():\n    class Net:\n        session = spark\n    return Net", scope)
    (problem,) = explain_pickle(scope["factory"]).problems
    assert problem.path == "fn.__globals__['spark']"


@pytest.mark.parametrize(
    ("module", "installed"),
    [("torch.nn", True), ("os.path", True), ("pytest", True), ("builtins", True), ("_io", True)]
    + [("__main__", False), (__name__, False), ("tests", False), ("not_loaded", False)],
)
def test_installed_modules(module: str, installed: bool) -> None:
    assert is_installed(module) == installed


def test_own_file_with_the_name_of_a_standard_module_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = types.ModuleType("code")
    own.__file__ = "/beside/code.py"
    monkeypatch.setitem(sys.modules, "code", own)
    assert not is_installed("code")

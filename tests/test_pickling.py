"""The serialization guard."""

from __future__ import annotations

import functools
import io
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark import SparkContext
from pyspark.sql import DataFrame, SparkSession
from torch import nn

from imagevec import ImageVectorizer, SerializationError, explain_pickle, register_model
from imagevec.pickling import check_pickle
from tests.helpers.factories import tiny

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

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from imagevec.models.syntax import syntax_of

SOURCE = '''\
def plain(x: int = 3, *rest, y=None, **more) -> int:
    """A docstring."""
    z: int = 3  # a comment
    undecided: float
    if x in {1, 2, "a"}:
        pass
    cache[x] = f"{x!r:>{z}} {{}} {y=}" "joined"
    names.append(x)
    assert x, "text"
    try:
        with open(x) as a, a:
            pass
    except (ValueError, TypeError) as error:
        raise
    match x:
        case {"a": 1, **others}:
            return 1
        case [1, *_] | str():
            return 2
    class Inner(int):
        """A docstring."""
        k: int = 4
    async def later():
        async for i in x:
            yield i
    return [lambda a: a, -1.5, 1_000, 2j, None, ..., b"x", *rest, [i for i in x if i], Inner]


first, second = lambda x: x + 1, lambda x: x + 2
'''
# Equal in Python 3.10 to 3.13. A new digest makes all factories new, so it must not change.
DIGEST = "3ead3f9a2540b279"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(tmp_path)

    def load(source: str) -> Any:
        (tmp_path / "syntax_example.py").write_text(source)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "syntax_example", raising=False)
        return importlib.import_module("syntax_example")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return load


def test_text_is_the_same_in_each_version_of_python(load: Callable[[str], Any]) -> None:
    text = syntax_of(load(SOURCE).plain).text
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGEST


def test_mutated_variables(load: Callable[[str], Any]) -> None:
    assert syntax_of(load(SOURCE).plain).mutated == {"cache", "names"}


def test_lambdas_in_one_line_differ(load: Callable[[str], Any]) -> None:
    module = load(SOURCE)
    assert syntax_of(module.first).text != syntax_of(module.second).text


def test_name_and_decorators_do_not_count(load: Callable[[str], Any]) -> None:
    module = load(
        "def one(x):\n    return x\n\n\n@staticmethod\ndef two(x):  # comment\n    return x\n"
    )
    assert syntax_of(module.one) == syntax_of(module.two.__func__)


def test_source_that_changed_after_the_import(tmp_path: Path, load: Callable[[str], Any]) -> None:
    """What was imported counts. A function that moved is found."""
    module = load("def one(x):\n    return x + 1\n\n\ndef two(x):\n    return x + 2\n")
    text = "# a comment\ndef one(x):\n    return x + 3\n\n\ndef two(x):\n    return x + 2\n"
    (tmp_path / "syntax_example.py").write_text(text)
    assert "Constant(value=int 2" in syntax_of(module.two).text
    assert "return" not in (changed := syntax_of(module.one).text)
    assert changed != syntax_of(load(text).one).text
    (tmp_path / "syntax_example.py").write_text("def one(x)")
    assert syntax_of(module.one).text == changed


def test_code_without_a_source() -> None:
    texts = []
    for number in (1, 1, 2):
        scope: dict[str, Any] = {}
        exec(f"def f(x): return x + {number}", scope)
        texts.append(syntax_of(scope["f"]).text)
    assert texts[0] == texts[1] != texts[2]

"""The code of a function as text that is equal in every Python version.

Bytecode differs between minor versions of Python. The text is made from the syntax tree in the
source, without comments, docstrings, annotations and layout. A source that changed after its import
is no problem: only a definition that compiles to the function's bytecode counts.
"""

from __future__ import annotations

import ast
import copy
import functools
import linecache
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_WITHOUT_EFFECT = ("annotation", "ctx", "kind", "returns", "simple", "type_comment", "type_params")
_MUTATORS = frozenset(
    {"add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault"}
    | {"update"}
)


@dataclass(frozen=True)
class Syntax:
    """The code of a function.

    Attributes:
        text: The normalised definition; without a source, the bytecode, which is only equal within
            a minor version of Python.
        mutated: The names of the variables whose items the code changes, such as caches.
    """

    text: str
    mutated: frozenset[str] = frozenset()


_known: dict[CodeType, Syntax] = {}  # a definition stays known if its source changes later


def syntax_of(function: FunctionType) -> Syntax:
    """Returns the code of a function, without what it captures."""
    code = function.__code__
    if code not in _known:
        linecache.checkcache(code.co_filename)
        source = "".join(linecache.getlines(code.co_filename, function.__globals__))
        bytecode = _bytecode(code)
        _known[code] = _definitions(source).get(bytecode) or Syntax(repr(bytecode))
    return _known[code]


@functools.lru_cache(maxsize=64)
def _definitions(source: str) -> dict[Any, Syntax]:
    """Returns each function and lambda in a source, by its bytecode."""
    try:
        tree, module = ast.parse(source), compile(source, "<source>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):  # an edit is under way, or it is not Python
        return {}
    texts: dict[Any, dict[str, ast.AST]] = defaultdict(dict)
    codes: dict[Any, dict[Any, None]] = defaultdict(dict)
    nodes = [node for node in ast.walk(tree) if isinstance(node, _Definition)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        texts[_place(node)]["".join(_definition(node))] = node
    for code in _nested(module):
        codes[code.co_firstlineno, code.co_name][_bytecode(code)] = None
    return {
        bytecode: Syntax(text, frozenset(_mutated(node)))
        for place in codes.keys() & texts.keys()
        if len(codes[place]) == len(texts[place])  # several lambdas in one line have an order
        for bytecode, (text, node) in zip(codes[place], texts[place].items(), strict=True)
    }


def _place(node: _Definition) -> tuple[int, str]:
    """Returns the first line and the name in the code object of a definition."""
    if isinstance(node, ast.Lambda):
        return node.lineno, "<lambda>"
    first = node.decorator_list[0] if node.decorator_list else node
    return first.lineno, node.name


def _nested(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


def _bytecode(code: Any) -> Any:
    """Returns what a code object does, without names of files and numbers of lines."""
    if isinstance(code, frozenset):
        return "frozenset", tuple(sorted(map(repr, code)))
    if isinstance(code, tuple):
        return tuple(map(_bytecode, code))
    if not isinstance(code, CodeType):
        return type(code).__name__, repr(code)
    return (
        (code.co_name, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        (code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars),
        _bytecode(code.co_consts),
    )


def _definition(node: _Definition) -> Iterator[str]:
    """Yields a function's parameters and body. Defaults and decorators have values in the function.

    A function has them in common with all that compile to the same bytecode.
    """
    parameters = copy.copy(node.args)
    parameters.defaults, parameters.kw_defaults = [], []
    yield type(node).__name__
    yield from _text(parameters)
    yield from _text(node.body)


def _text(node: Any) -> Iterator[str]:
    """Yields the parts of a normalised syntax tree.

    ``ast.dump`` and ``ast.unparse`` write the same tree differently in each version of Python.
    """
    if isinstance(node, list):
        for item in node:
            yield from _text(item)
    elif isinstance(node, ast.Pass) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
    ):
        return
    elif isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield from _text(ast.Assign(targets=[node.target], value=node.value))
    elif isinstance(node, ast.JoinedStr):  # Python 3.12 has empty texts in it
        texts = [item for item in node.values if getattr(item, "value", None) != ""]
        yield from ("JoinedStr(", *_text(texts), ")")
    elif isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if name not in _WITHOUT_EFFECT and value is not None and value != []:
                yield f"{name}="
                yield from _text(value)
        yield ")"
    else:
        yield f"{type(node).__name__} {node!r},"


def _mutated(definition: ast.AST) -> Iterator[str]:
    """Yields the variables that ``x[key] = value``, ``x.append(value)`` and the like change."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.value, ast.Name):
            is_call = isinstance(node, ast.Attribute) and node.attr in _MUTATORS
            if is_call or (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)):
                yield node.value.id

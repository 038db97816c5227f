"""The points, between two file operations, at which a run that writes a table may stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from imagevec.storage.folder import Folder

CUT_OFF = "the list of what is replaced is cut off"

# A method of Folder, whether to stop before or after it, and a predicate that selects the call.
POINTS: dict[str, tuple[str, str, Callable[..., bool]]] = {
    "before the list": ("write", "before", lambda path, *_: "replace-" in path),
    CUT_OFF: ("write", "after", lambda path, *_: "replace-" in path),
    "after the list": ("write", "after", lambda path, *_: "replace-" in path),
    "first deletion": ("delete", "after", lambda path: path.endswith(".parquet")),
    "all deletions": ("move", "before", lambda source, _: "/runs/" not in source),
    "first move": ("move", "after", lambda source, _: "/runs/" not in source),
    "all moves": ("delete", "before", lambda path: "replace-" in path),
    "replaced": ("delete", "after", lambda path: "replace-" in path),
    "first publication": ("move", "after", lambda source, _: "/runs/" in source),
}


def stop_at(point: str, stop: Callable[[], object], patch: Callable[..., object] = setattr) -> None:
    """Patches ``Folder`` to call ``stop`` at the given point."""
    name, when, is_it = POINTS[point]
    method = getattr(Folder, name)

    def watched(self: Folder, *arguments: Any, **named: Any) -> Any:
        if not is_it(*arguments):
            return method(self, *arguments, **named)
        if point == CUT_OFF:
            arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2])
        if when == "after":
            method(self, *arguments, **named)
        return stop()

    patch(Folder, name, watched)


def fail_at(
    number: int, patch: Callable[..., object], error: type[BaseException], is_lasting: bool = False
) -> Callable[[], int]:
    """Patches ``Folder`` so that its ``number``-th call raises an error.

    Args:
        number: The call that fails, from 0. Calls of the fence are not counted.
        is_lasting: Whether all later calls fail, too.

    Returns:
        A function that returns the number of calls.
    """
    calls = 0

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Folder, *arguments: Any, **named: Any) -> Any:
            nonlocal calls
            if "epochs" not in "".join(arguments[:1]):
                calls += 1
                if calls - 1 == number or (is_lasting and calls > number):
                    raise error("of the test")
            return method(self, *arguments, **named)

        return call

    for name in ("names", "read", "write", "create", "delete", "move"):
        patch(Folder, name, watched(getattr(Folder, name)))
    return lambda: calls

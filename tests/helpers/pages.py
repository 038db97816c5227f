"""Tables of the documentation that tests write and compare."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

WRITES = os.environ.get("IMAGEVEC_WRITE_DOCS") == "1"
"""Whether tests write what they would compare."""


def check_table(page: Path, name: str, head: Sequence[str], rows: Sequence[str]) -> None:
    """Compares the rows between ``<!-- begin name -->`` and ``<!-- end -->``, or writes them."""
    if WRITES:
        table = "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])
        start, mark, rest = page.read_text().partition(f"<!-- begin {name} -->\n")
        page.write_text(f"{start}{mark}{table}\n{rest[rest.index('<!-- end -->') :]}")
    assert tables(page)[name] == list(rows)


def tables(page: Path) -> dict[str, list[str]]:
    """Returns the rows of each table of a page."""
    marked = re.findall(r"<!-- begin (.+?) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL)
    return {name: text.splitlines()[2:] for name, text in marked}

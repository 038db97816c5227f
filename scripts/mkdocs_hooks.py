"""Adds to the documentation: the version, the benchmark charts, and links to documented names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from imagevec._version import __version__

CHARTS = Path(__file__).parents[1] / "benchmarks/results/images"


def on_config(config: Any) -> None:
    config.extra["version"] = __version__


def on_files(files: Files, config: Any) -> None:
    """Adds the charts, which are outside of ``docs/``, as ``images/<name>.png``."""
    for path in CHARTS.glob("*.png"):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))


def on_page_content(html: str, **_: Any) -> str:
    """Links full names in docstrings, if the page documents them, and labels cells of tables."""

    def linked(match: re.Match[str]) -> str:
        code, name = match[0], match[1]
        return f'<a href="#{name}">{code}</a>' if f'id="{name}"' in html else code

    html = re.sub(r"<code>(imagevec(?:\.\w+)+)</code>", linked, html)
    return re.sub(r"<table>.*?</table>", _labelled, html, flags=re.DOTALL)


def _labelled(table: re.Match[str]) -> str:
    """Names the column of each cell, which ``site.css`` shows on narrow screens."""
    names = [re.sub("<.*?>", "", name) for name in re.findall(r"<th\b.*?>(.*?)</th>", table[0])]

    def labelled(row: re.Match[str]) -> str:
        columns = iter(names)
        return re.sub("<td", lambda _: f'<td data-column="{next(columns, "")}"', row[0])

    return re.sub(r"<tr>.*?</tr>", labelled, table[0], flags=re.DOTALL)

"""A result's JSON to its Markdown table and chart, and to the table of the README."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

README = Path("README.md")
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"

_COLOURS = {"float32": "#3b6fb6", "bfloat16": "#2a9d6f", "int8": "#d1862b"}
_BASELINE_COLOUR = "#9a9a9a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, nargs="?", default="benchmarks/results/bench.json")
    parser.add_argument("--readme", action="store_true", help="refresh the table of the README")
    arguments = parser.parse_args()
    write(arguments.result)
    if arguments.readme:
        refresh_readme(json.loads(arguments.result.read_text()))


def write(path: Path) -> None:
    """Writes a ``.md`` and a ``.png`` beside a result's ``.json``."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(result))
    chart(result, path.with_suffix(".png"))


def refresh_readme(result: dict[str, Any]) -> None:
    """Puts the table of the first stage between the README's markers."""
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README} has no {BEGIN} ... {END}")
    stage = _stages(result)[0]
    body = "\n\n".join([_stage_line(result, stage), _table(result, stage), _where(result)])
    README.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")


def markdown(result: dict[str, Any]) -> str:
    """All tables of a result."""
    parts = [_where(result)]
    for stage in _stages(result):
        parts += [f"## {stage}", _stage_line(result, stage), _table(result, stage)]
    if result.get("notes"):
        parts.append("\n".join(f"- {note}" for note in result["notes"]))
    if result.get("memory"):
        parts += ["## Memory", _memory_table(result["memory"])]
    if result.get("failures"):
        parts += ["## Failures", "\n".join(f"- {failure}" for failure in result["failures"])]
    return "\n\n".join(parts) + "\n"


def chart(result: dict[str, Any], path: Path) -> None:
    """One panel a stage: a bar for each row, and a line over it from the worst round to the best.

    Our rows are coloured by precision, forward passes alone are hatched, the rest is grey.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = _stages(result)
    heights = [len(_rows(result, stage)) + 1.6 for stage in stages]
    figure = Figure(figsize=(10, 0.36 * sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(stages), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, stage in zip(panels, stages, strict=True):
        _draw(panel, _rows(result, stage), _stage_line(result, stage))
    panels[-1].set_xlabel("images/s (median; the line spans the rounds)")
    figure.suptitle(_machine_line(result), fontsize=9, color="#555555")
    figure.savefig(path, dpi=110)


def _draw(panel: Any, rows: list[dict[str, Any]], title: str) -> None:
    rates = [[row["images"] / seconds for seconds in row["seconds"]] for row in rows]
    medians = [row["images_per_second"] for row in rows]
    for place, (row, row_rates, median) in enumerate(zip(rows, rates, medians, strict=True)):
        ours = row["approach"].startswith("features_udf")
        ceiling = row["lowest_cosine"] is None
        colour = _COLOURS[row["precision"]] if ours or ceiling else _BASELINE_COLOUR
        panel.barh(
            place,
            median,
            color="white" if ceiling else colour,
            edgecolor=colour,
            hatch="////" if ceiling else None,
            height=0.72,
        )
        panel.plot([min(row_rates), max(row_rates)], [place, place], color="black", linewidth=1)
        ratio = row.get("ratio_to_baseline")
        label = f"{median:.1f}" + (f"  ({statistics.median(ratio):.2f}x)" if ratio else "")
        panel.annotate(
            label, (max(row_rates), place), (5, 0), textcoords="offset points", va="center"
        )
    panel.set_yticks(range(len(rows)), [_label(row) for row in rows])
    panel.invert_yaxis()
    panel.set_xlim(0, max(map(max, rates)) * 1.18)
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    panel.spines[["top", "right"]].set_visible(False)


def _table(result: dict[str, Any], stage: str) -> str:
    lines = [
        "| approach | images/s | x broadcast UDF, by round | of the ceiling | lowest cosine |",
        "|---|---:|---|---:|---:|",
    ]
    for row in _rows(result, stage):
        cells = [
            _label(row),
            f"{row['images_per_second']:.1f}",
            _by_round(row.get("ratio_to_baseline")),
            _median(row.get("fraction_of_ceiling")),
            "" if row["lowest_cosine"] is None else f"{row['lowest_cosine']:.6f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    scaling = [
        f"{row['approach']} {statistics.median(row['scaling']):.2f}x"
        for row in _rows(result, stage)
        if "scaling" in row
    ]
    if scaling:
        lines += ["", f"From 1 worker to 2: {'; '.join(scaling)}."]
    return "\n".join(lines)


def _memory_table(figures: list[dict[str, Any]]) -> str:
    lines = ["| approach | images | peak RSS of a worker, MB |", "|---|---|---|"]
    for row in figures:
        images, peaks = (" -> ".join(map(str, row[key])) for key in ("images", "peak_rss_mb"))
        lines.append(f"| {row['approach']} ({row['stage']}) | {images} | {peaks} |")
    return "\n".join(lines)


def _stages(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in result["rows"]))


def _rows(result: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["stage"] == stage]


def _label(row: dict[str, Any]) -> str:
    return row["approach"] + (", 1 worker" if row["workers"] == 1 else "")


def _by_round(ratios: list[float] | None) -> str:
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"


def _median(figures: list[float] | None) -> str:
    return f"{statistics.median(figures):.2f}" if figures else ""


def _stage_line(result: dict[str, Any], stage: str) -> str:
    model = stage.partition(",")[0]
    images = result["image_sets"][stage]
    kind = "generated photo-like" if images["generated"] else "given"
    kilobytes = images["median_bytes"] / 1000
    return (
        f"{model} on {images['count']} {kind} images, "
        f"median {images['median_size']} and {kilobytes:,.0f} KB"
    )


def _machine_line(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    flags = " ".join(machine["flags"])
    return f"{machine['cpu']}, {machine['cores']} cores ({flags}), {settings['master']}"


def _where(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = result["settings"]
    return (
        f"{_machine_line(result)}; medians of interleaved rounds after a "
        f"warm-up; Arrow batches of {settings['arrow_batch_rows']} rows; {versions}."
    )


if __name__ == "__main__":
    main()

"""Converts a result's JSON to Markdown tables, to charts, and to the figures in the README."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.machine import kind_of, processor
from benchmarks.results import BASELINE

RESULTS = Path("benchmarks/results")
README = Path("README.md")
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"

README_STAGE = "resnet50, small"
_CHART = "Images per second of ResNet-50 on the small images, in each approach"
_CHART_OF_OTHERS = "Images per second on larger images and with other models"

_COLOURS = {"float32": "#3b6fb6", "bfloat16": "#2a9d6f", "int8": "#d1862b"}
_BASELINE_COLOUR = "#9a9a9a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "result", type=Path, nargs="?", help="one JSON file (default: all results of make bench)"
    )
    parser.add_argument("--readme", action="store_true", help="update the figures in the README")
    arguments = parser.parse_args()
    if arguments.result:
        write(arguments.result)
    else:
        write_bench(RESULTS)
    if arguments.readme:
        refresh_readme()


def bench_file(folder: Path, machine: dict[str, Any]) -> Path:
    """Returns the file for the results of ``make bench`` on this kind of processor."""
    return folder / f"bench-{kind_of(machine['flags'])[0]}.json"


def write_bench(folder: Path) -> None:
    """Writes ``bench.md`` and the charts of the results of all kinds of processors in a folder."""
    parts = []
    for path in bench_files(folder):
        result = json.loads(path.read_text())
        parts.append(f"## Results: {processor(result['machine'])}")
        parts += [*write_charts(path), markdown(result, "###")]
    (folder / "bench.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


def bench_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("bench-*.json"))


def write(path: Path) -> None:
    """Writes the tables of a result next to its ``.json``, and its charts."""
    path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))
    write_charts(path)


def write_charts(path: Path) -> list[str]:
    """Draws the charts of a result's ``.json`` into the folder ``images`` next to it.

    Returns:
        Markdown: ``<name>.png`` shows the first stage, and ``<name>-all.png`` the others, if any.
    """
    result = json.loads(path.read_text())
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    first, *others = _stages(result)
    chart(result, [first], images / f"{path.stem}.png")
    written = [f"![{_CHART}](images/{path.stem}.png)"]
    if others:
        chart(result, others, images / f"{path.stem}-all.png")
        written.append(f"![{_CHART_OF_OTHERS}](images/{path.stem}-all.png)")
    return written


def refresh_readme() -> None:
    """Writes the summaries between the README's markers."""
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README} does not contain {BEGIN} ... {END}")
    README.write_text(f"{before}{BEGIN}\n{summaries(RESULTS)}\n{END}{after}")


def summaries(folder: Path) -> str:
    """The README's figures: a paragraph and a chart per kind of processor."""
    parts = []
    for path in bench_files(folder):
        parts += [
            summary(json.loads(path.read_text())),
            f"![{_CHART}]({path.parent}/images/{path.stem}.png)",
        ]
    return "\n\n".join(parts)


def summary(result: dict[str, Any]) -> str:
    """One line for the README: ResNet-50 on the small images, with all workers."""
    images = result["image_sets"][README_STAGE]
    rows = {row["approach"]: row for row in _compared_rows(result, README_STAGE)}

    def rate(approach: str) -> str:
        return f"{rows[approach]['images_per_second']:.1f}"

    def ours(precision: str) -> str:
        approach = f"features_udf, {precision}"
        ratio = statistics.median(rows[approach]["ratio_to_baseline"])
        return f"{rate(approach)} in {precision} ({ratio:.2f}x)"

    # "float32" without instructions for bfloat16
    computed = rows["features_udf, bfloat16"]["precision"]
    faster = [ours("bfloat16")] if computed == "bfloat16" else []
    of_ceiling = statistics.median(rows[f"features_udf, {computed}"]["fraction_of_ceiling"])
    return (
        f"ResNet-50 on {images['median_size']} JPEGs, {processor(result['machine'])}: "
        f"a {BASELINE} processes {rate(BASELINE)} images/s; `features_udf` processes "
        f"{', '.join([ours('float32'), *faster])} and {ours('int8')}. In {computed}, that is "
        f"{of_ceiling:.0%} of the speed of the forward pass without decoding and Spark. "
        f"Medians of {len(rows[BASELINE]['seconds'])} rounds, ratios within a round."
    )


def markdown(result: dict[str, Any], heading: str = "##") -> str:
    """Returns all tables of a result."""
    parts = [_where(result)]
    for stage in _stages(result):
        parts += [f"{heading} {stage}", _stage_line(result, stage), _table(result, stage)]
    if result.get("notes"):
        parts.append("\n".join(f"- {note}" for note in result["notes"]))
    if result.get("memory"):
        parts += [f"{heading} Memory", _memory_table(result["memory"])]
    if result.get("failures"):
        parts += [
            f"{heading} Failures",
            "\n".join(f"- {failure}" for failure in result["failures"]),
        ]
    return "\n\n".join(parts) + "\n"


def chart(result: dict[str, Any], stages: list[str], path: Path) -> None:
    """Draws one panel per stage: a bar per approach, and a line from the worst round to the best.

    Bars of this project are coloured by precision, forward passes are hatched, and the others are
    grey. Labels are readable at a width of 800 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [len(_compared_rows(result, stage)) + 1.6 for stage in stages]
    figure = Figure(figsize=(8, 0.34 * sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(stages), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, stage in zip(panels, stages, strict=True):
        _draw(panel, _compared_rows(result, stage))
        title = f"{stage.partition(',')[0]}, {result['image_sets'][stage]['median_size']} images"
        panel.set_title(title, loc="left", fontsize=13, fontweight="bold")
    panels[-1].set_xlabel("images/s (median; the line spans the rounds)", fontsize=12)
    figure.savefig(path, dpi=200)


def _draw(panel: Any, rows: list[dict[str, Any]]) -> None:
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
            height=0.75,
        )
        panel.plot([min(row_rates), max(row_rates)], [place, place], color="black", linewidth=1.5)
        ratio = row.get("ratio_to_baseline")
        label = f"{median:.1f}" + (f" ({statistics.median(ratio):.2f}x)" if ratio else "")
        panel.annotate(
            label,
            (max(row_rates), place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=13,
        )
    panel.set_yticks(range(len(rows)), [row["approach"] for row in rows], fontsize=13)
    panel.tick_params(axis="x", labelsize=12)
    panel.invert_yaxis()
    panel.set_xlim(0, max(map(max, rates)) * 1.4)
    panel.spines[["top", "right"]].set_visible(False)


def _table(result: dict[str, Any], stage: str) -> str:
    lines = [
        "| approach | images/s | speedup over broadcast UDF (by round) | fraction of ceiling "
        "| lowest cosine |",
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
        f"{statistics.median(row['scaling']):.2f}x ({row['approach']})"
        for row in _rows(result, stage)
        if "scaling" in row
    ]
    if scaling:
        lines += ["", f"Speedup from 1 worker to 2: {', '.join(scaling)}."]
    return "\n".join(lines)


def _memory_table(figures: list[dict[str, Any]]) -> str:
    lines = ["| approach | images | peak RSS per worker, MB |", "|---|---|---|"]
    for row in figures:
        images, peaks = (" -> ".join(map(str, row[key])) for key in ("images", "peak_rss_mb"))
        lines.append(f"| {row['approach']} ({row['stage']}) | {images} | {peaks} |")
    return "\n".join(lines)


def _stages(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in result["rows"]))


def _rows(result: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["stage"] == stage]


def _compared_rows(result: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """The rows of a stage that use all workers."""
    rows = _rows(result, stage)
    return [row for row in rows if row["workers"] == rows[0]["workers"]]


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
    kind = "generated photo-like" if images["generated"] else "user-provided"
    kilobytes = images["median_bytes"] / 1000
    return (
        f"{model} on {images['count']} {kind} images "
        f"(median {images['median_size']}, {kilobytes:,.0f} KB)"
    )


def _where(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])}), "
        f"`{settings['master']}`. Medians of interleaved rounds after a warm-up; Arrow batches of "
        f"{settings['arrow_batch_rows']} rows. Versions: {versions}."
    )


if __name__ == "__main__":
    main()

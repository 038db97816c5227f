"""The files that ``make bench`` writes on different kinds of processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.machine import kind_of
from tests.helpers.shared import ROOT

pytest.importorskip("matplotlib")

RESULT = ROOT / "benchmarks/results/bench-avx512-bf16.json"


def without_bfloat16(result: dict[str, Any]) -> dict[str, Any]:
    """What the same run gives on a processor that computes bfloat16 in float32."""
    machine = {"cpu": "Ice Lake", "cores": 2, "flags": ["avx2", "avx512f", "avx512_vnni"]}
    rows = [
        {**row, "precision": "float32" if row["precision"] == "bfloat16" else row["precision"]}
        for row in result["rows"]
        if row["approach"] != "forward pass only, openvino, bfloat16"
    ]
    return {**result, "machine": machine, "rows": rows}


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"], "amx"),
        (["avx2", "avx512f", "avx512_vnni", "avx512_bf16"], "avx512-bf16"),
        (["avx2", "avx512f", "avx512_vnni"], "avx512-vnni"),
        (["avx2"], "avx2"),
        (["asimd", "bf16"], "arm-bf16"),
        ([], "other"),
    ],
)
def test_kind_of_processor_is_its_best_instruction(flags: list[str], kind: str) -> None:
    assert kind_of(flags)[0] == kind


def test_each_kind_of_processor_keeps_its_result(tmp_path: Path) -> None:
    first = json.loads(RESULT.read_text())
    second = without_bfloat16(first)
    for result in (first, second):
        report.bench_file(tmp_path, result["machine"]).write_text(json.dumps(result))
        report.write_bench(tmp_path)
    assert [path.name for path in report.bench_files(tmp_path)] == [
        "bench-avx512-bf16.json",
        "bench-avx512-vnni.json",
    ]
    assert json.loads((tmp_path / "bench-avx512-bf16.json").read_text()) == first
    tables = (tmp_path / "bench.md").read_text()
    assert "## Results: AMD EPYC, 2 cores (AVX-512 with BF16)\n" in tables
    assert "## Results: Ice Lake, 2 cores (AVX-512 with VNNI, without BF16)\n" in tables
    for name in ("bench-avx512-bf16.png", "bench-avx512-vnni-all.png"):
        assert f"(images/{name})" in tables
        assert (tmp_path / "images" / name).is_file()


def test_summaries_quote_each_kind_of_processor(tmp_path: Path) -> None:
    first = json.loads(RESULT.read_text())
    for result in (first, without_bfloat16(first)):
        report.bench_file(tmp_path, result["machine"]).write_text(json.dumps(result))
    with_bfloat16, _, without, _ = report.summaries(tmp_path).split("\n\n")
    assert "45.3 in bfloat16 (3.04x) and 84.0 in int8" in with_bfloat16
    assert "In bfloat16, that is 89%" in with_bfloat16
    assert "Ice Lake, 2 cores (AVX-512 with VNNI, without BF16)" in without
    assert "23.0 in float32 (1.54x) and 84.0 in int8 (5.29x). In float32, that is 92%" in without

from __future__ import annotations

import importlib.metadata
from typing import Any

import pyspark
import pytest

from imagevec import recommended_conf
from imagevec.cli import doctor
from imagevec.cli.doctor import _GPU_OF_TASK, _SPARK_DEFAULTS, _advice, _precision, _versions
from imagevec.engines import devices
from imagevec.options import ENGINES
from imagevec.spark.conf import ARROW_BYTES, ARROW_RECORDS

SPARK: dict[str, Any] = {  # 4.3, where nothing is set
    "spark.master": "local[2]",
    ARROW_RECORDS: 10_000,
    ARROW_BYTES: 64 << 20,
    "spark.task.cpus": "1",
    "spark.python.worker.reuse": "true",
    "spark.python.daemon.module": "pyspark.daemon",
    "spark.python.unix.domain.socket.enabled": "false",
    "Spark cores": 2,
    "OMP_NUM_THREADS": "not set",
}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 2)


def configured(**options: int) -> dict[str, Any]:
    """With what ``recommended_conf`` sets, without the size of executors."""
    conf: dict[str, Any] = {
        name: int(value) if name in (ARROW_RECORDS, ARROW_BYTES) else value
        for name, value in recommended_conf(**options).items()
        if not name.startswith("spark.executor.")
    }
    return {**SPARK, **conf}


def test_every_setting_is_looked_at():
    looked_at = {ARROW_RECORDS, ARROW_BYTES, _GPU_OF_TASK, *_SPARK_DEFAULTS}
    recommended = recommended_conf(executor_gpus=1)
    assert looked_at == {name for name in recommended if not name.startswith("spark.executor.")}


def test_every_setting_that_differs_from_recommended_conf_is_advice():
    advice = _advice(SPARK)
    recommended = recommended_conf()
    differing = [
        *(ARROW_BYTES, ARROW_RECORDS, "spark.python.daemon.module"),
        "spark.python.unix.domain.socket.enabled",
    ]
    assert advice == [
        f"{name} is {SPARK[name]}: imagevec.recommended_conf() sets {recommended[name]}"
        for name in differing
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"image_bytes": 20_000}, {"image_bytes": 10**6}, {"executor_cores": 8}]
    + [{"executor_cores": 8, "executor_gpus": 2}],
)
def test_recommended_conf_is_fine(options):
    assert _advice(configured(**options)) == []


def test_before_spark_4_rows_are_counted():
    facts = configured()
    del facts[ARROW_BYTES]
    assert _advice(facts) == []
    (sentence,) = _advice({**facts, ARROW_RECORDS: 10_000})
    assert sentence.startswith(f"{ARROW_RECORDS} is 10000: ")


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        (ARROW_BYTES, 256 << 20, f"{ARROW_BYTES} is 268435456"),
        (ARROW_BYTES, -1, f"{ARROW_BYTES} is -1"),
        ("spark.python.worker.reuse", "false", "sets true"),
        ("spark.task.cpus", "2", "sets 1"),
        ("OMP_NUM_THREADS", "2", "unset it"),
        ("Spark cores", 4, "use local[2]"),
    ],
)
def test_what_to_change(name, value, part):
    (sentence,) = _advice({**configured(), name: value})
    assert part in sentence


def test_a_package_without_metadata_is_listed(monkeypatch):
    """As PySpark is where a platform puts it on PYTHONPATH."""

    def version(package: str) -> str:
        if package == "pyspark":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = _versions()
    assert found["pyspark"] == pyspark.__version__
    assert found["torch"] == "1.0"


@pytest.mark.parametrize(
    ("bfloat16", "instructions", "precision"),
    [
        (True, {"avx512_vnni", "avx512_bf16"}, "bfloat16"),
        (True, {"asimd", "bf16"}, "bfloat16"),
        (False, {"avx2", "avx512f", "avx512_vnni"}, "int8"),
        (False, {"avx2", "avx_vnni"}, "int8"),
        (False, {"avx2", "avx512f"}, "float32"),
        (False, {"asimd"}, "float32"),
    ],
)
def test_precision_for_each_kind_of_processor(bfloat16, instructions, precision, monkeypatch):
    for engine in ENGINES:
        monkeypatch.setattr(f"imagevec.engines.{engine}.has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(devices, "instructions", lambda: instructions)
    assert _precision() == precision


def test_report_shows_processor_and_quota(monkeypatch):
    monkeypatch.setattr(devices, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(devices, "instructions", lambda: {"sse2", "avx2", "avx512_bf16"})
    monkeypatch.setattr(doctor, "_precision", lambda: "bfloat16")
    monkeypatch.setattr(doctor, "_examine_spark", lambda master: ({}, []))
    facts = doctor.examine(None)
    assert (facts["cores"], facts["cpu_quota"]) == (2, 1.5)
    assert facts["cpu_instructions"] == ["avx2", "avx512_bf16"]
    text = doctor.show(facts)
    assert "\nCPU         2 cores, CPU quota 1.5 (avx2 avx512_bf16)\n" in text
    assert "\nprecision   bfloat16: this CPU has instructions for it" in text
    assert "\nCPU         2 cores (" in doctor.show({**facts, "cpu_quota": None})

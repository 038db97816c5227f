"""Report this machine's setup and suggest changes."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from imagevec.errors import ImageVecError
from imagevec.spark.conf import ARROW_BYTES, ARROW_RECORDS

_PACKAGES = (
    "imagevec",
    "pyspark",
    "torch",
    "torchvision",
    "openvino",
    "pandas",
    "pyarrow",
    "pillow",
)
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")
_IMAGES = 16
_LARGE_ARROW_RECORDS = 1000
_LARGE_ARROW_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--master", help="Spark's master URL (default: spark-submit's, else local[*])"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    return examine(options.master)


def examine(master: str | None) -> dict[str, Any]:
    """Facts by name, and ``advice``: sentences, none if nothing should be changed."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "java": _java(),
        "versions": _versions(),
        "cores": os.cpu_count(),
        "cpu_instructions": _cpu_instructions(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    advice = []
    if "openvino" not in facts["versions"] and not facts["gpus"]:
        advice.append("pip install 'imagevec[openvino]': the faster engine on CPUs")
    try:
        facts["spark"], more = _examine_spark(master)
        advice += more
    except ImageVecError as error:
        facts["spark"] = None
        advice.append(f"{error}; PySpark 4 needs Java 17 or newer, and JAVA_HOME or java on PATH")
    return {**facts, "advice": advice}


def show(result: dict[str, Any]) -> str:
    spark = result["spark"] or {}
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"Python      {result['python']}",
        f"Java        {result['java'] or 'none'}",
        f"packages    {versions}",
        f"CPU         {result['cores']} cores ({' '.join(result['cpu_instructions'])})",
        f"GPUs        {', '.join(result['gpus']) or 'none'}",
        *(f"{name:<45} {value}" for name, value in spark.items()),
        "",
    ]
    lines += [f"-> {sentence}" for sentence in result["advice"]] or ["No changes recommended."]
    return "\n".join(lines)


def _examine_spark(master: str | None) -> tuple[dict[str, Any], list[str]]:
    """The user's settings and Spark's defaults, not those that the other commands choose."""
    from imagevec.cli.session import spark_session

    with spark_session(master, recommended=False) as spark:
        conf = spark.sparkContext.getConf()
        rate, start_seconds = _timing(spark)
        facts = {
            "spark.master": spark.sparkContext.master,
            ARROW_RECORDS: int(spark.conf.get(ARROW_RECORDS) or 0),
            ARROW_BYTES: _arrow_bytes(spark),
            "spark.python.worker.reuse": conf.get("spark.python.worker.reuse", "true") == "true",
            "spark.task.cpus": int(conf.get("spark.task.cpus", "1") or 1),
            "cores of Spark": spark.sparkContext.defaultParallelism,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "not set",
            "first vectors after, seconds": round(start_seconds, 1),
            f"resnet18 on {_IMAGES} images of 500x375, images/s": round(rate, 1),
        }
    return facts, _advice(facts)


def _advice(facts: dict[str, Any]) -> list[str]:
    """What to change in Spark's settings."""
    advice = []
    records, task_cpus, cores = (
        facts[name] for name in (ARROW_RECORDS, "spark.task.cpus", "cores of Spark")
    )
    any_bytes = isinstance(facts[ARROW_BYTES], str) or facts[ARROW_BYTES] > _LARGE_ARROW_BYTES
    if any_bytes and (records > _LARGE_ARROW_RECORDS or records <= 0):
        advice.append(
            f"{ARROW_RECORDS}={records}, {ARROW_BYTES}={facts[ARROW_BYTES]}: Arrow batches of "
            "images should be some 16 MB; see imagevec.recommended_conf"
        )
    if not facts["spark.python.worker.reuse"]:
        advice.append("spark.python.worker.reuse=false: each task loads the model anew; set true")
    threads = facts["OMP_NUM_THREADS"]
    if threads.isdigit() and int(threads) > task_cpus:
        advice.append(
            f"OMP_NUM_THREADS={threads} is more than spark.task.cpus={task_cpus}: unset it"
        )
    available = os.cpu_count() or 1
    if str(facts["spark.master"]).startswith("local") and cores * task_cpus > available:
        advice.append(f"Spark runs {cores} tasks on {available} cores: use local[{available}]")
    return advice


def _arrow_bytes(spark: Any) -> int | str:
    if int(spark.version.partition(".")[0]) < 4:
        return "no limit before Spark 4"
    text = spark.conf.get(ARROW_BYTES)  # "64m", for example
    return int(spark._jvm.org.apache.spark.network.util.JavaUtils.byteStringAsBytes(text))


def _timing(spark: Any) -> tuple[float, float]:
    """Images/s of a warm query, and seconds of the first one, with the start of the workers."""
    import numpy as np
    from PIL import Image

    from imagevec.spark.udf import features_udf

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((500, 375)).save(file, "JPEG")
    rows = [(file.getvalue(),)] * _IMAGES
    frame = spark.createDataFrame(rows, "content binary").repartition(
        spark.sparkContext.defaultParallelism
    )
    features = frame.select(features_udf("content", model="resnet18", weights="random"))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        features.write.format("noop").mode("overwrite").save()
        seconds.append(time.perf_counter() - start)
    return _IMAGES / min(seconds[1:]), seconds[0]


def _java() -> str | None:
    """The version of the Java that PySpark will take."""
    home = os.environ.get("JAVA_HOME")
    program = str(Path(home) / "bin" / "java") if home else "java"
    try:
        done = subprocess.run([program, "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stderr.partition("\n")[0]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        if importlib.util.find_spec("PIL" if package == "pillow" else package):
            found[package] = importlib.metadata.version(package)
    return found


def _cpu_instructions() -> list[str]:
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return [name for name in _INSTRUCTIONS if name in words]

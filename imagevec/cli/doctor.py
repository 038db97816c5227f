"""Report this machine's setup and suggest changes."""

from __future__ import annotations

import argparse
import io
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from imagevec.errors import ImageVecError, pyspark_required
from imagevec.options import ENGINES
from imagevec.spark.conf import ARROW_BYTES, ARROW_RECORDS, recommended_conf

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
# Instructions that determine which precision is fast, by Linux's names.
_INT8 = ("avx_vnni", "avx512_vnni", "amx_int8")
_INSTRUCTIONS = ("avx2", "avx512f", *_INT8, "avx512_bf16", "amx_bf16", "asimd", "i8mm", "bf16")
_PRECISIONS = {
    "bfloat16": "this CPU has instructions for it; int8 is faster and less exact",
    "int8": "this CPU has instructions for it (VNNI) but not for bfloat16; imagevec.quantize "
    "makes such a model, and float32 is exact",
    "float32": "no lower precision is known to be faster on this CPU",
}
_IMAGES = 16
_GPU_OF_TASK = "spark.task.resource.gpu.amount"
_UNIX_SOCKET = "spark.python.unix.domain.socket.enabled"
# Spark's defaults for settings that are not set. Spark itself reports those of SQL settings.
_SPARK_DEFAULTS = {
    "spark.task.cpus": "1",
    "spark.python.worker.reuse": "true",
    "spark.python.daemon.module": "pyspark.daemon",
    _UNIX_SOCKET: "false",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--master", help="Spark master URL (default: the one given to spark-submit, or local[*])"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    return examine(options.master)


def examine(master: str | None) -> dict[str, Any]:
    """Returns facts by name, and ``advice``: sentences, or none if no change is recommended."""
    import torch

    from imagevec.engines import devices

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "java": _java(),
        "versions": _versions(),
        "cores": devices.cores(),
        "cpu_quota": devices.cpu_quota(),
        "cpu_instructions": [name for name in _INSTRUCTIONS if name in devices.instructions()],
        "precision": _precision(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    advice = []
    if "openvino" not in facts["versions"] and not facts["gpus"]:
        advice.append("run pip install 'imagevec[openvino]': OpenVINO is faster on CPUs")
    try:
        facts["spark"], more = _examine_spark(master)
        advice += more
    except ImageVecError as error:
        facts["spark"] = None
        sentence = str(error)
        if sentence.startswith("Spark did not start"):
            sentence += "; PySpark 4 needs Java 17 or newer: set JAVA_HOME, or put java on PATH"
        advice.append(sentence)
    return {**facts, "advice": advice}


def show(result: dict[str, Any]) -> str:
    spark = result["spark"] or {}
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"Python      {result['python']}",
        f"Java        {result['java'] or 'none'}",
        f"packages    {versions}",
        f"CPU         {_cores(result)} ({' '.join(result['cpu_instructions'])})",
        f"precision   {result['precision']}: {_PRECISIONS[result['precision']]}",
        f"GPUs        {', '.join(result['gpus']) or 'none'}",
        *(f"{name:<45} {value}" for name, value in spark.items()),
        "",
    ]
    lines += [f"-> {sentence}" for sentence in result["advice"]] or ["No changes recommended."]
    return "\n".join(lines)


def _examine_spark(master: str | None) -> tuple[dict[str, Any], list[str]]:
    """Examines the user's settings and Spark's defaults, not what the other commands set."""
    with pyspark_required():
        from imagevec.cli.session import spark_session

    with spark_session(master, recommended=False) as spark:
        rate, start_seconds = _timing(spark)
        facts = {
            "spark.master": spark.sparkContext.master,
            **_settings(spark),
            "Spark cores": spark.sparkContext.defaultParallelism,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "not set",
            "seconds to the first vectors": round(start_seconds, 1),
            f"resnet18 on {_IMAGES} images of 500x375, images/s": round(rate, 1),
        }
    return facts, _advice(facts)


def _settings(spark: Any) -> dict[str, Any]:
    """Returns this Spark's settings from ``recommended_conf``, except the size of executors."""
    conf = spark.sparkContext.getConf()
    settings = {ARROW_RECORDS: int(spark.conf.get(ARROW_RECORDS))}
    if _release(spark) >= (4, 0):
        text = spark.conf.get(ARROW_BYTES)  # "64m", for example
        to_bytes = spark._jvm.org.apache.spark.network.util.JavaUtils.byteStringAsBytes
        settings[ARROW_BYTES] = int(to_bytes(text))
    settings |= {name: conf.get(name, default) for name, default in _SPARK_DEFAULTS.items()}
    if _release(spark) < (4, 1):
        del settings[_UNIX_SOCKET]
    if conf.contains(_GPU_OF_TASK):
        settings[_GPU_OF_TASK] = conf.get(_GPU_OF_TASK)
    return settings


def _release(spark: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in spark.version.split(".")[:2])


def _advice(facts: dict[str, Any]) -> list[str]:
    """Returns changes to recommend for Spark's settings."""
    task_cpus = max(1, int(float(facts["spark.task.cpus"])))
    from imagevec.engines import devices

    gpus = int(_GPU_OF_TASK in facts)
    recommended = recommended_conf(executor_cores=task_cpus if gpus else 1, executor_gpus=gpus)
    advice = [
        f"{name} is {facts[name]}: imagevec.recommended_conf() sets {value}"
        for name, value in recommended.items()
        if name in facts and not _is_fine(name, facts, recommended)
    ]
    threads = facts["OMP_NUM_THREADS"]
    if threads.isdigit() and int(threads) > task_cpus:
        advice.append(f"OMP_NUM_THREADS={threads} exceeds spark.task.cpus={task_cpus}: unset it")
    cores, available = facts["Spark cores"], devices.cores()
    if str(facts["spark.master"]).startswith("local") and cores > available:
        advice.append(
            f"Spark uses {cores} cores, but it may use {available} of this machine: "
            f"use local[{available}]"
        )
    return advice


def _is_fine(name: str, facts: dict[str, Any], recommended: dict[str, str]) -> bool:
    if name in (ARROW_RECORDS, ARROW_BYTES) and 0 < facts[name] <= int(recommended[name]):
        return True
    if name == ARROW_RECORDS and ARROW_BYTES in facts:  # any number of rows, if bytes are limited
        return _is_fine(ARROW_BYTES, facts, recommended)
    return bool(facts[name] == recommended[name])


def _timing(spark: Any) -> tuple[float, float]:
    """Returns images/s of a warm query, and seconds of the first one, including worker startup."""
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
    """Returns the version of the Java that PySpark uses."""
    home = os.environ.get("JAVA_HOME")
    program = str(Path(home) / "bin" / "java") if home else "java"
    try:
        done = subprocess.run([program, "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stderr.partition("\n")[0]


def _versions() -> dict[str, str]:
    import importlib.metadata
    import importlib.util

    found = {}
    for package in _PACKAGES:
        if importlib.util.find_spec("PIL" if package == "pillow" else package):
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:  # a platform's own PySpark
                module = importlib.import_module(package)
                found[package] = str(getattr(module, "__version__", "of unknown version"))
    return found


def _precision() -> str:
    """Returns the precision to use on this CPU: see the table in docs/tuning.md."""
    from imagevec.engines import backend, devices

    engine = next(name for name in ENGINES if backend(name).is_available())
    if backend(engine).has_bfloat16("cpu"):
        return "bfloat16"
    return "float32" if devices.instructions().isdisjoint(_INT8) else "int8"


def _cores(result: dict[str, Any]) -> str:
    cores, quota = result["cores"], result["cpu_quota"]
    return f"{cores} cores" + ("" if quota is None else f", CPU quota {quota:g}")

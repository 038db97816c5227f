"""Recommended Spark settings for image jobs."""

from __future__ import annotations

from pathlib import Path

from imagevec.errors import OptionError
from imagevec.options import ENGINES, check_positive

ARROW_RECORDS = "spark.sql.execution.arrow.maxRecordsPerBatch"
DAEMON = "spark.python.daemon.module"
ARROW_BYTES = "spark.sql.execution.arrow.maxBytesPerBatch"

_ARROW_BATCH_BYTES = 16 << 20  # Spark holds a few Arrow batches per task, in the JVM and in Python
_MAX_ARROW_RECORDS = 10_000  # Spark's own default


def recommended_conf(
    *, image_bytes: int = 100_000, executor_cores: int = 4, executor_gpus: int = 0
) -> dict[str, str]:
    """Returns Spark settings for feature extraction, for ``SparkSession.builder.config``.

    On CPUs, each core runs its own task: single-threaded workers are at least as fast as one worker
    with several threads, and need no tuning. Each GPU serves a single task, whose cores decode
    images for it.

    Args:
        image_bytes: The size of a typical image file, in bytes.
        executor_cores: The number of cores per executor.
        executor_gpus: The number of GPUs per executor.

    Returns:
        - ``spark.sql.execution.arrow.maxBytesPerBatch``: 16 MiB. The default is 256 MiB on Spark
          4.0 and 64 MiB on 4.3, in the JVM and again in Python. Spark 3.5 does not count bytes.
        - ``spark.sql.execution.arrow.maxRecordsPerBatch``: rows that total about 16 MiB, for Spark
          3.5, whose default of 10,000 rows is 1 GB of 100 KB images.
        - ``spark.task.cpus`` and ``spark.executor.cores``: see above.
        - ``spark.python.worker.reuse``: without it, each task loads the model again.
        - ``spark.python.daemon.module``: each executor runs the imports once, and workers start
          immediately. Left out where this process imports imagevec from an archive, as with
          ``--py-files``: workers unpack it later than the daemon starts.
        - ``spark.python.unix.domain.socket.enabled``: for Spark 4.1 and newer. A task ends 20 ms
          sooner than over TCP, which delays the acknowledgement of small packets.
        - ``spark.executor.memoryOverhead``: Python workers use memory outside the JVM's heap. Each
          gets 768 MiB, for a model the size of ResNet-50, or 1.5 GiB with PyTorch. PyTorch runs on
          GPUs, and on CPUs if OpenVINO is not installed on the driver.
        - ``spark.executor.resource.gpu.amount`` and ``spark.task.resource.gpu.amount``, with GPUs.

    Raises:
        OptionError: A number is below 1, ``executor_gpus`` is below 0, or the cores cannot be
            divided equally among the GPUs.
    """
    for name, value in (("image_bytes", image_bytes), ("executor_cores", executor_cores)):
        check_positive(name, value)
    if executor_gpus < 0:
        raise OptionError(f"executor_gpus={executor_gpus} is not valid: use 0 or a larger number")
    if executor_gpus and executor_cores % executor_gpus:
        raise OptionError(
            f"executor_cores={executor_cores} is not valid: "
            f"use a multiple of executor_gpus={executor_gpus}"
        )
    task_cpus = executor_cores // executor_gpus if executor_gpus else 1
    workers = executor_cores // task_cpus
    records = min(max(_ARROW_BATCH_BYTES // image_bytes, 1), _MAX_ARROW_RECORDS)
    conf = {
        ARROW_BYTES: str(_ARROW_BATCH_BYTES),
        ARROW_RECORDS: str(records),
        "spark.task.cpus": str(task_cpus),
        "spark.executor.cores": str(executor_cores),
        "spark.python.worker.reuse": "true",
        **({DAEMON: "imagevec.spark.daemon"} if Path(__file__).is_file() else {}),
        "spark.python.unix.domain.socket.enabled": "true",
        "spark.executor.memoryOverhead": f"{workers * _worker_memory_mb(executor_gpus)}m",
    }
    if executor_gpus:
        conf["spark.executor.resource.gpu.amount"] = str(executor_gpus)
        conf["spark.task.resource.gpu.amount"] = "1"
    return conf


def _worker_memory_mb(gpus: int) -> int:
    from imagevec.engines import backend  # which imports NumPy

    device = "cuda" if gpus else "cpu"
    for name in ENGINES:
        if backend(name).is_available() and backend(name).why_not("float32", device) is None:
            return backend(name).WORKER_MEMORY_MB
    raise AssertionError("PyTorch runs everywhere")

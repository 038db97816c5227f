"""A ``Plan`` on a worker: its device, its schedule, and its engine, which this process keeps.

Spark keeps Python workers alive between tasks (``spark.python.worker.reuse``, its default), so an
engine is built once in a process and then serves every task, query and re-created UDF with the same
plan. A worker that idles for a minute is ended by Spark, and its engines with it.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from imagevec.engines import Engine, backend
from imagevec.errors import OptionError
from imagevec.files import verified
from imagevec.plan import Plan
from imagevec.spec import Preprocessing, Tokenization
from imagevec.stream import Schedule
from imagevec.texts.tokenize import Tokenizer

_MAX_ENGINES = 3
_engines: OrderedDict[tuple[str, str, int], Engine] = OrderedDict()
_lock = threading.Lock()

_tokenizers: dict[Tokenization, Tokenizer] = {}

_AUTO_BATCH_PIXELS = {"cpu": 8 * 224 * 224, "cuda": 128 * 224 * 224}
_AUTO_BATCH_TEXTS = {"cpu": 32, "cuda": 512}


def get_engine(
    plan: Plan,
    locate: Callable[[str], Path],
    device: str,
    threads: int,
    when_built: Callable[[], None] = lambda: None,
) -> Engine:
    """This process's engine for a plan; of too many, the least recently used is dropped.

    Args:
        plan: What to build.
        locate: The name of a shipped file to its path on this machine.
        device: Where it runs: ``"cpu"`` or ``"cuda:N"``.
        threads: Of one forward pass on the CPU.
        when_built: Called where the engine was not there yet.

    Raises:
        WeightsError: A file is missing or was altered.
    """
    key = (plan.key, device, threads)
    with _lock:
        if key not in _engines:
            files = [verified(locate(name)) for name in plan.engine_files]
            load = backend(plan.backend).load
            _engines[key] = load(plan.spec, plan.source, files, device, threads)
            if len(_engines) > _MAX_ENGINES:
                _engines.popitem(last=False)
            when_built()
        _engines.move_to_end(key)
        return _engines[key]


def freeze_heap() -> None:
    """Takes all objects that there are out of the garbage collector's sight.

    PySpark collects garbage in the worker after each task, which walks every object: with PyTorch
    imported that takes 0.2 s. What the imports and an engine made stays as long as the process.
    """
    gc.collect()
    gc.freeze()


def device_here(device: str, gpu_addresses: Sequence[str] = ()) -> str:
    """The device that a plan means in this process: ``"cpu"`` or ``"cuda:N"``.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        gpu_addresses: The GPUs that Spark assigned to the task; ``"cuda"`` is the first one.

    Raises:
        OptionError: The device is not here.
    """
    if device == "cpu":
        return device
    import torch

    if device == "cuda":
        device = f"cuda:{gpu_addresses[0] if gpu_addresses else 0}"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2]) >= found:
        raise OptionError(
            f"device={device!r} is not there: PyTorch finds {found} CUDA devices on this machine; "
            "use 'cpu' or 'auto'"
        )
    return device


def threads_here() -> int:
    """How many threads one forward pass outside of Spark takes: this process's cores."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(limit) if limit.isdigit() and int(limit) else cores or 1


def _auto_batch_size(
    preprocessing: Preprocessing | Tokenization, on_gpu: bool, task_cpus: int
) -> int:
    if isinstance(preprocessing, Tokenization):
        return _AUTO_BATCH_TEXTS["cuda" if on_gpu else "cpu"]
    pixels = _AUTO_BATCH_PIXELS["cuda"] if on_gpu else _AUTO_BATCH_PIXELS["cpu"] * task_cpus
    return max(1, pixels // preprocessing.crop_size**2)


def get_tokenizer(plan: Plan, locate: Callable[[str], Path]) -> Tokenizer:
    """This process's tokenizer for a plan of texts; ``locate`` is the one of ``get_engine``.

    Raises:
        MissingExtraError: Without the extra ``clip``.
        WeightsError: Its vocabulary is missing or was altered.
    """
    tokenization = plan.spec.preprocessing
    assert isinstance(tokenization, Tokenization)
    with _lock:
        if tokenization not in _tokenizers:
            _tokenizers.clear()  # a process rarely needs a second one
            vocabulary = verified(locate(tokenization.vocabulary))
            _tokenizers[tokenization] = Tokenizer(vocabulary, tokenization)
        return _tokenizers[tokenization]


def schedule(plan: Plan, device: str, task_cpus: int) -> Schedule:
    """Never more threads at work than ``task_cpus``, but for one that only feeds a GPU.

    Args:
        plan: Its input size and batch size matter.
        device: Where the forward pass runs: ``"cpu"`` or ``"cuda:N"``.
        task_cpus: ``spark.task.cpus``.
    """
    on_gpu = device != "cpu"
    wanted = plan.execution.batch_size
    if isinstance(wanted, str):
        wanted = _auto_batch_size(plan.spec.preprocessing, on_gpu, task_cpus)
    return Schedule(
        batch_size=wanted,
        forward_threads=task_cpus,
        decode_threads=task_cpus,
        overlap=on_gpu,
    )

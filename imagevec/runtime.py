"""Turns a ``Plan`` on a worker into a device, a schedule and an engine, and caches the engine.

Spark keeps Python workers alive between tasks (``spark.python.worker.reuse``, on by default), so a
process builds an engine once and reuses it for every task, query and re-created UDF with the same
plan. Spark ends a worker that is idle for a minute, together with its engines.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from imagevec.engines import Engine, backend, devices
from imagevec.errors import OptionError
from imagevec.files import verified
from imagevec.plan import Plan
from imagevec.spec import Preprocessing, Tokenization
from imagevec.stream import Schedule
from imagevec.texts.tokenize import Tokenizer

logger = logging.getLogger(__name__)

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
    """Returns this process's engine for a plan, and evicts the least recently used one if needed.

    Args:
        plan: The plan.
        locate: A function from the name of a shipped file to its path on this machine.
        device: The device to run on, ``"cpu"`` or ``"cuda:N"``.
        threads: The number of threads of one forward pass on the CPU.
        when_built: A function that is called after an engine is built.

    Raises:
        WeightsError: A file is missing or was altered.
    """
    key = (plan.key, device, threads)
    with _lock:
        if key not in _engines:
            files = [verified(locate(name)) for name in plan.engine_files]
            spec = dataclasses.replace(plan.spec, precision=precision_here(plan, device))
            load = backend(plan.backend).load
            _engines[key] = load(spec, plan.source, files, device, threads)
            if len(_engines) > _MAX_ENGINES:
                _engines.popitem(last=False)
                gc.unfreeze()  # its module may refer to itself: only a collection frees it
            when_built()
        _engines.move_to_end(key)
        return _engines[key]


def precision_here(plan: Plan, device: str) -> str:
    """Returns the precision in which this machine computes a plan, with a warning if it is another.

    The plan's precision is the lowest that the user accepts. bfloat16 that a processor must emulate
    takes three times as long as float32.

    Args:
        plan: The plan.
        device: The device of the forward pass, ``"cpu"`` or ``"cuda:N"``.
    """
    precision = plan.spec.precision
    if precision == "bfloat16" and not _has_bfloat16(plan.backend, device):
        return "float32"
    return precision


@functools.cache
def _has_bfloat16(backend_name: str, device: str) -> bool:
    native = backend(backend_name).has_bfloat16(device)
    if not native:  # once in a process
        logger.warning(
            "%s finds no bfloat16 instructions to use on this machine's %s: computing in float32, "
            "which is faster than emulating bfloat16",
            backend_name,
            "CPU" if device == "cpu" else device,
        )
    return native


def freeze_heap() -> None:
    """Exempts all current objects from garbage collection.

    PySpark collects garbage in the worker after each task, which visits every object and takes
    0.2 s once PyTorch is imported. The objects of the imports and the engine are never freed.
    """
    gc.collect()
    gc.freeze()


def device_here(device: str, gpu_addresses: Sequence[str] = ()) -> str:
    """Resolves a plan's device to ``"cpu"`` or ``"cuda:N"`` in this process.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        gpu_addresses: The GPUs that Spark assigned to the task; ``"cuda"`` uses the first one.

    Raises:
        OptionError: The device is not available.
    """
    if device == "cpu":
        return device
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda":
        device = f"cuda:{_gpu_index(gpu_addresses[0], found) if gpu_addresses else 0}"
    if int(device.partition(":")[2]) >= found:
        raise OptionError(
            f"device={device!r} is not available: PyTorch finds {found} CUDA devices on this "
            "machine; use 'cpu' or 'auto'"
        )
    return device


def _gpu_index(address: str, found: int) -> int:
    """Returns PyTorch's index of a GPU: of a number as it is, of a UUID among the visible GPUs.

    Raises:
        OptionError: No visible GPU has this UUID.
    """
    import torch

    if address.isdigit():
        return int(address)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    uuids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(found)]
    for known in (visible[:found], uuids):
        if address in known:
            return known.index(address)
    raise OptionError(
        f"Spark assigned the GPU {address!r}, but PyTorch finds {', '.join(uuids) or 'none'}: a "
        "part of a GPU (MIG) is only found if CUDA_VISIBLE_DEVICES of the executor names it"
    )


def threads_here() -> int:
    """Returns the number of threads of a forward pass outside Spark: this process's cores."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) else devices.cores()


def _auto_batch_size(
    preprocessing: Preprocessing | Tokenization, on_gpu: bool, task_cpus: int
) -> int:
    if isinstance(preprocessing, Tokenization):
        return _AUTO_BATCH_TEXTS["cuda" if on_gpu else "cpu"]
    pixels = _AUTO_BATCH_PIXELS["cuda"] if on_gpu else _AUTO_BATCH_PIXELS["cpu"] * task_cpus
    return max(1, pixels // math.prod(preprocessing.input_shape))


def get_tokenizer(plan: Plan, locate: Callable[[str], Path]) -> Tokenizer:
    """Returns this process's tokenizer for a text plan; ``locate`` is as in ``get_engine``.

    Raises:
        MissingExtraError: The extra ``clip`` is not installed.
        WeightsError: The vocabulary is missing or was altered.
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
    """Schedules at most ``task_cpus`` busy threads, plus one that only feeds a GPU.

    Args:
        plan: The plan, for its input size and batch size.
        device: The device of the forward pass, ``"cpu"`` or ``"cuda:N"``.
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

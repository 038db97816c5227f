"""The state of one Python worker process: its engines, its device, its threads.

Spark keeps Python workers alive between tasks (``spark.python.worker.reuse``, its default), so an
engine is built once in a process and then serves every task, query and re-created UDF with the same
recipe. A worker that idles for a minute is ended by Spark, and its engines with it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from imagevec.engines import Engine
from imagevec.errors import OptionError
from imagevec.plan import Recipe

_MAX_ENGINES = 3
_engines: OrderedDict[tuple[str, torch.device], Engine] = OrderedDict()
_lock = threading.Lock()

_AUTO_BATCH_PIXELS = {"cpu": 8 * 224 * 224, "cuda": 128 * 224 * 224}


def get_engine(
    recipe: Recipe, locate: Callable[[str], Path], device: torch.device, threads: int
) -> Engine:
    """This process's engine for a recipe; of too many, the least recently used is dropped.

    Args:
        recipe: What to build.
        locate: The name of a shipped file to its path on this machine.
        device: Where it runs.
        threads: Of one forward pass on the CPU.
    """
    key = (recipe.key, device)
    with _lock:
        if key not in _engines:
            _engines[key] = recipe.build_engine(locate, device, threads)
            if len(_engines) > _MAX_ENGINES:
                _engines.popitem(last=False)
        _engines.move_to_end(key)
        return _engines[key]


def resolve_device(device: str, gpu_addresses: Sequence[str] = ()) -> torch.device:
    """The device that an option means in this process.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        gpu_addresses: The GPUs that Spark assigned to the task; the first one is used.

    Raises:
        OptionError: An explicit device is not here.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if device in ("auto", "cuda"):
        device = f"cuda:{gpu_addresses[0]}" if gpu_addresses else "cuda:0"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2]) >= found:
        raise OptionError(
            f"device={device!r} is not there: PyTorch finds {found} CUDA devices on this machine; "
            "use 'cpu' or 'auto'"
        )
    return torch.device(device)


class Schedule(NamedTuple):
    """How one task divides the cores that Spark gave it.

    Attributes:
        batch_size: Images in one forward pass.
        forward_threads: Of the forward pass, if it is on the CPU.
        decode_threads: Images that are decoded at a time.
        overlap: Whether decoding goes on during the forward pass.
    """

    batch_size: int
    forward_threads: int
    decode_threads: int
    overlap: bool


def schedule(
    recipe: Recipe, batch_size: int | Literal["auto"], device: torch.device, task_cpus: int
) -> Schedule:
    """Never more threads at work than ``task_cpus``, but for one that only feeds a GPU.

    Args:
        recipe: Its engine and input size matter.
        batch_size: The option.
        device: Where the forward pass runs.
        task_cpus: ``spark.task.cpus``.
    """
    on_gpu = device.type == "cuda"
    pixels = _AUTO_BATCH_PIXELS[device.type] * (1 if on_gpu else task_cpus)
    fitting = max(1, pixels // recipe.spec.preprocessing.crop_size**2)
    # PyTorch's own threads resize, where its engine runs on the CPU.
    decode_threads = 1 if recipe.engine == "torch" and not on_gpu else task_cpus
    images = fitting if batch_size == "auto" else batch_size
    return Schedule(images, task_cpus, decode_threads, overlap=on_gpu)

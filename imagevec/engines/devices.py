"""What this machine gives to this process: the processor's instructions, and a number of cores."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_INSTRUCTIONS = ("flags", "Features")  # in /proc/cpuinfo, on x86 and on Arm


def instructions(root: Path = _ROOT) -> frozenset[str]:
    """Returns the processor's instruction sets by Linux's names; on other systems none are known.

    Args:
        root: The folder that contains ``proc``.
    """
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    of_cores = [line.partition(":")[2] for line in lines if line.startswith(_INSTRUCTIONS)]
    return frozenset(" ".join(of_cores).split())


def has_bfloat16() -> bool:
    """Returns whether this CPU multiplies bfloat16 by instructions: AVX-512, AMX or Arm's."""
    return not instructions().isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def cores(root: Path = _ROOT) -> int:
    """Returns how many cores this process may keep busy: its affinity within its quota, rounded up.

    Args:
        root: The folder that contains ``proc`` and ``sys``.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
    allowed = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = cpu_quota(root)
    return allowed if quota is None else min(allowed, max(1, math.ceil(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Returns the CPU time that cgroups grant this process, in cores; ``None`` without a limit.

    The cgroup of the process and all above it limit it. Inside a container, the names can be those
    of the host; the container's own cgroup is then at the top of what is mounted.
    """
    limits = [_limit(folder) for folder in _cgroups(root)]
    return min((limit for limit in limits if limit is not None), default=None)


@contextmanager
def within_quota() -> Iterator[int]:
    """Keeps PyTorch and OpenVINO from starting a thread per core of the machine; for the driver.

    It yields ``cores()``. OpenVINO's default follows the affinity of the calling thread, which is
    therefore reduced: to random cores, because other containers on the machine may do the same.
    """
    import torch

    count = cores()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, count))
    if affinity is not None:
        os.sched_setaffinity(0, random.sample(sorted(affinity), count))
    try:
        yield count
    finally:
        torch.set_num_threads(threads)
        if affinity is not None:
            os.sched_setaffinity(0, affinity)


def _cgroups(root: Path) -> Iterator[Path]:
    """Yields the folders of this process's cgroups with CPU limits, each followed by those above.

    Of version 2, there is one. It is mounted at ``unified`` where version 1 is also used.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        path = PurePosixPath(name.lstrip("/"))
        for top in (controllers, "cpu") if controllers else ("", "unified"):
            yield from (mounted / top / each for each in (path, *path.parents))


def _limit(cgroup: Path) -> float | None:
    """Returns the limit of one cgroup: quota by period, where "max" and -1 mean no limit."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / file).read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        if quota.isdecimal():
            return int(quota) / int(period)
    return None

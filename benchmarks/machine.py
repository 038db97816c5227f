"""The hardware and versions that a result records; no host names and no paths."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from imagevec.engines import devices

PACKAGES = (
    "imagevec",
    "pyspark",
    "torch",
    "torchvision",
    "open_clip_torch",
    "openvino",
    "nncf",
    "numpy",
    "pandas",
    "pyarrow",
    "pillow",
    "ray",
    "daft",
)
# Instructions that determine the cost of a forward pass in each precision.
FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)
# Kinds of processors, best first: the name in files, the instruction that decides, and the title.
KINDS = (
    ("amx", "amx_bf16", "AMX"),
    ("avx512-bf16", "avx512_bf16", "AVX-512 with BF16"),
    ("avx512-vnni", "avx512_vnni", "AVX-512 with VNNI, without BF16"),
    ("avx512", "avx512f", "AVX-512 without VNNI and BF16"),
    ("avx2-vnni", "avx_vnni", "AVX2 with VNNI"),
    ("avx2", "avx2", "AVX2 without VNNI"),
    ("arm-bf16", "bf16", "Arm with BF16"),
    ("arm", "asimd", "Arm without BF16"),
    ("other", "", "unknown instructions"),
)


def machine() -> dict[str, Any]:
    import psutil

    return {
        "cpu": _model_name() or platform.processor() or platform.machine(),
        "cores": devices.cores(),
        "flags": [flag for flag in FLAGS if flag in devices.instructions()],
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
    }


def kind_of(flags: Collection[str]) -> tuple[str, str]:
    """Returns a processor's kind, for names of files, and its title."""
    return next((name, title) for name, flag, title in KINDS if flag in (*flags, ""))


def processor(about: Mapping[str, Any]) -> str:
    """Describes the processor of a result in a phrase, from what ``machine`` returned."""
    _, title = kind_of(about["flags"])
    return f"{about['cpu']}, {about['cores']} cores ({title})"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _model_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, "").strip()

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imagevec.engines import devices
from tests.helpers.pipeline import run_python

# /proc/self/cgroup of a container with cgroups of version 1, and of a machine with both versions
V1 = """\
12:cpuset:{0}
4:memory:{0}
3:cpu,cpuacct:{0}
1:name=systemd:{0}
"""
HYBRID = """\
2:cpuset:/
1:name=systemd:/user.slice
0::{0}
"""

# Lines of /proc/cpuinfo: of an AMD EPYC of the fourth generation, and of a Graviton3
X86 = """\
processor	: 0
model name	: AMD EPYC
flags		: fpu sse2 avx2 avx512f avx512_bf16 clzero avx512_vnni
bugs		: sysret_ss_attrs null_seg
processor	: 1
flags		: fpu sse2 avx2 avx512f avx512_bf16 clzero avx512_vnni
"""
ARM = """\
processor	: 0
Features	: fp asimd asimddp sve i8mm bf16
CPU implementer	: 0x41
"""


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5, 7}, raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1_limit(folder: str, quota: str) -> dict[str, str]:
    cgroup = f"sys/fs/cgroup/{folder}"
    return {f"{cgroup}/cpu.cfs_quota_us": quota, f"{cgroup}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("text", "quota", "cores"),
    [
        ("max 100000\n", None, 4),
        ("50000 100000\n", 0.5, 1),
        ("100000 100000\n", 1, 1),
        ("150000 100000\n", 1.5, 2),
        ("20000 10000\n", 2, 2),
        ("1600000 100000\n", 16, 4),
    ],
)
def test_quota_is_rounded_up_and_limited_by_affinity(
    text: str, quota: float | None, cores: int, tmp_path: Path
) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text})
    assert devices.cpu_quota(tmp_path) == quota
    assert devices.cores(tmp_path) == cores


def test_quota_of_a_parent_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/kubepods/pod7/worker\n",
        "sys/fs/cgroup/kubepods/cpu.max": "800000 100000\n",
        "sys/fs/cgroup/kubepods/pod7/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/kubepods/pod7/worker/cpu.max": "max 100000\n",
        "sys/fs/cgroup/kubepods/pod8/cpu.max": "10000 100000\n",
    }
    assert devices.cpu_quota(write(tmp_path, files)) == 1.5


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_quota_of_version_1(mount: str, tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": V1.format("/docker/1f2e"),
        **v1_limit(mount, "-1\n"),
        **v1_limit(f"{mount}/docker/1f2e", "250000\n"),
    }
    assert devices.cpu_quota(write(tmp_path, files)) == 2.5


def test_quota_of_a_container_that_mounts_only_its_own_cgroup(tmp_path: Path) -> None:
    """Its name is that of the host."""
    files = {"proc/self/cgroup": V1.format("/docker/1f2e"), **v1_limit("cpu", "50000\n")}
    assert devices.cpu_quota(write(tmp_path, files)) == 0.5


def test_quota_of_version_2_beside_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": HYBRID.format("/user.slice/job"),
        "sys/fs/cgroup/unified/user.slice/job/cpu.max": "200000 100000\n",
        **v1_limit("cpu", "-1\n"),
    }
    assert devices.cpu_quota(write(tmp_path, files)) == 2


def test_no_quota_outside_of_cgroups(tmp_path: Path) -> None:
    assert devices.cpu_quota(tmp_path) is None
    assert devices.cores(tmp_path) == 4
    above = {"proc/self/cgroup": "0::/../../other\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}
    assert devices.cpu_quota(write(tmp_path, above)) == 3


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [(X86, {"avx512_bf16", "avx512_vnni", "sse2"}), (ARM, {"bf16", "i8mm", "asimd"})],
)
def test_instructions_of_cpuinfo(cpuinfo: str, expected: set[str], tmp_path: Path) -> None:
    found = devices.instructions(write(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert expected <= found
    assert found.isdisjoint(("sysret_ss_attrs", "0x41", "AMD"))


def test_no_instructions_are_known_without_cpuinfo(tmp_path: Path) -> None:
    assert devices.instructions(tmp_path) == frozenset()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_threads_are_started_within_the_quota_only_inside() -> None:
    """OpenVINO starts as many threads as the affinity allows."""
    printed = run_python("""
import os
from imagevec.engines import devices
allowed = os.sched_getaffinity(0)
devices.cpu_quota = lambda root: 0.5
with devices.within_quota() as count:
    inside = os.sched_getaffinity(0)
print(count, len(inside), inside <= allowed, os.sched_getaffinity(0) == allowed)
""")
    assert printed.split() == ["1", "1", "True", "True"]

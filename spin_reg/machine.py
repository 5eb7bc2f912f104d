"""How much of this machine is ours: schedulers (Slurm, taskset) and containers grant fewer cores and less memory than
it has. Threads beyond the cores that are granted wait for each other, and who takes more memory is killed.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")  # the control groups of this process: see cgroups(7)
GROUPS = Path("/sys/fs/cgroup")
CPU = Path("/proc/cpuinfo")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # instructions that multiply it: of x86 CPUs, and of ARM's


def cores() -> int:
    """Cores that this process is bound to, and no more than the time on them that its control groups grant."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [*_said("cpu", "cpu.max"), *_said("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    granted = [int(quota) / int(period) for quota, period in quotas if quota.isdigit()]  # else "max", or -1
    return math.ceil(min([bound, *granted]))


def threads() -> int | None:
    """What the environment says of threads, as OpenMP reads it; None: nothing, or nothing that can be read."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None


def memory() -> int:
    """Bytes of memory: what there is, and no more than the control groups grant."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_said("memory", "memory.max"), *_said("memory", "memory.limit_in_bytes")]
    return min([installed, *(int(limit) for (limit,) in limits if limit.isdigit())])


def bfloat16() -> bool | None:
    """Whether the CPU has instructions that multiply bfloat16; None: it does not say."""
    lines = CPU.read_text(encoding="utf-8", errors="replace").splitlines() if CPU.is_file() else []
    told = [line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))]
    return bool(BFLOAT16.intersection(told[0])) if told else None


def _said(controller: str, *names: str) -> Iterator[list[str]]:
    """The words in files of these names, of the process's control group and of each around it (versions 1 and 2)."""
    lines = OWN.read_text().splitlines() if OWN.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        top = GROUPS / controller if controllers else GROUPS
        own = top / path.lstrip("/")  # in a container it may be the path outside: then only the top is there
        for folder in [own, *own.parents][: len(own.parts) - len(top.parts) + 1]:
            if all((folder / name).is_file() for name in names):
                yield " ".join((folder / name).read_text() for name in names).split()

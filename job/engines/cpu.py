"""What this machine's CPU is to this process: its model, its cores, and the memory behind it.

A container sees the whole machine's figures and may use its own part alone.
"""

import math
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")


def model(cpuinfo: Path = CPUINFO) -> str:
    """The maker's name of it where the kernel tells one, else the architecture's."""
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def cores(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use: the machine's, or fewer where it is bound or limited."""
    return min([len(os.sched_getaffinity(0)), *_quotas(cgroups)])


def memory_limit(cgroups: Path = CGROUPS) -> int:
    """Bytes that this process may use: the machine's, or fewer where its container has a limit."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int((cgroups / name).read_text()))
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return min(limits)


def reset_peak_memory() -> bool:
    """Lets this process's peak begin with what it holds now; whether its kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """The most bytes that this process held at once.

    By its own mark: what `getrusage` tells may be the peak of the process that started it.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _quotas(cgroups: Path) -> Iterator[int]:
    """What the container's CPU time comes to in whole cores, in either version of cgroups."""
    with suppress(OSError, ValueError):  # no such file, or `max`
        quota, period = map(int, (cgroups / "cpu.max").read_text().split())
        yield max(1, math.ceil(quota / period))
    with suppress(OSError, ValueError):
        quota = int((cgroups / "cpu/cpu.cfs_quota_us").read_text())
        period = int((cgroups / "cpu/cpu.cfs_period_us").read_text())
        if quota > 0:  # -1 is no limit
            yield max(1, math.ceil(quota / period))

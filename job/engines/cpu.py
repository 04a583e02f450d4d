"""The CPU model, and the cores and memory that this process may use.

In a container the kernel reports the whole machine, but only the container's limits are usable.
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
    """The model name if the kernel knows it, else the architecture."""
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def cores(cgroups: Path = CGROUPS) -> int:
    """Cores this process may use: the machine's, or fewer if it is pinned or limited."""
    return min([len(os.sched_getaffinity(0)), *_quotas(cgroups)])


def memory_limit(cgroups: Path = CGROUPS) -> int:
    """Bytes this process may use: the machine's, or fewer if its container has a limit."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int((cgroups / name).read_text()))
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return min(limits)


def reset_peak_memory() -> bool:
    """Resets this process's peak to its current memory; returns whether the kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """The most bytes this process has held at once.

    From its own high-water mark: `getrusage` may return the peak of the parent process.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _quotas(cgroups: Path) -> Iterator[int]:
    """The container's CPU quota in whole cores, from cgroups v2 or v1."""
    with suppress(OSError, ValueError):  # no such file, or `max`
        quota, period = map(int, (cgroups / "cpu.max").read_text().split())
        yield max(1, math.ceil(quota / period))
    with suppress(OSError, ValueError):
        quota = int((cgroups / "cpu/cpu.cfs_quota_us").read_text())
        period = int((cgroups / "cpu/cpu.cfs_period_us").read_text())
        if quota > 0:  # -1 is no limit
            yield max(1, math.ceil(quota / period))

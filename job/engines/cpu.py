"""The CPU model, and the memory that this process may use."""

import platform
from contextlib import suppress
from pathlib import Path

from job.distributed.cores import CGROUPS

CPUINFO = Path("/proc/cpuinfo")


def model(cpuinfo: Path = CPUINFO) -> str:
    """The model name if the kernel knows it, else the architecture."""
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


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

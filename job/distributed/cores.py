"""The cores that a process may use, and the threads that numeric libraries start for them.

In a container the kernel reports the whole machine, but only the container's limits are usable.
"""

import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "1000"
"""How often a thread looks for more work before it sleeps: for some 50 microseconds, longer than
the gap between most operations. libgomp's own 300,000 are milliseconds, in which it holds a core
that another job's thread needs (`benchmarks.shared_cpu`)."""


def cores(cgroups: Path = CGROUPS) -> int:
    """Cores this process may use: the machine's, or fewer if it is pinned or limited."""
    return min([len(os.sched_getaffinity(0)), *_quotas(cgroups)])


def threads(ranks: int = 1, *, cgroups: Path = CGROUPS, topology: Path = TOPOLOGY) -> int:
    """Threads for one of `ranks` processes: its share of the cores, each counted once.

    Two hardware threads of one core compute matrix products no faster than one does.
    """
    physical = set[str]()
    for number in os.sched_getaffinity(0):
        siblings = topology / f"cpu{number}" / "topology" / "thread_siblings_list"
        try:
            physical.add(siblings.read_text().strip())
        except OSError:
            physical.add(f"{number}")
    return max(1, min(cores(cgroups), len(physical)) // max(1, ranks))


def configure_threads(environ: MutableMapping[str, str]) -> None:
    """Sets what OpenMP and MKL read when they are loaded, unless the environment has it already.

    As many threads as this process has cores, not as the machine has; and they sleep while they
    wait, so that processes on the same cores do not slow each other down more than they share.
    """
    local = environ.get("LOCAL_WORLD_SIZE", "")
    ranks = int(local) if local.isdecimal() else 1
    given = {name: environ[name] for name in THREADS if name in environ}
    if ranks > 1 and "TORCHELASTIC_RUN_ID" in environ and given == {"OMP_NUM_THREADS": "1"}:
        # What torchrun sets if nobody did, however many cores there are.
        given = {}
    if not given:
        environ["OMP_NUM_THREADS"] = str(threads(ranks))
    if not any(name in environ for name in WAITING):
        environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT=SPINS)


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

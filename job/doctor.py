"""`job doctor`: what this machine has of what the job needs."""

import shutil
import sys
from pathlib import Path

from job import log, provenance

MIN_FREE = 10 * 2**30


def doctor() -> int:
    """Prints a line a check; gives 0 where the job can run here, else 1."""
    healthy = True

    def check(ok: bool, name: str, found: str, fix: str = "") -> None:
        nonlocal healthy
        healthy = healthy and ok
        mark = "ok  " if ok else "FAIL"
        print(f"{mark}  {name:<14}{found}" + (f"\n      fix: {fix}" if fix and not ok else ""))

    supported = (3, 11) <= sys.version_info < (3, 13)
    check(supported, "python", sys.version.split()[0], "use Python 3.11 or 3.12")
    found = provenance.versions()
    for package in ("torch", "torchvision", "transformers", "trl", "peft", "datasets"):
        check(package in found, package, found.get(package, "missing"), "make setup")
    if "torch" in found:
        _check_torch(check)
    for package in ("bitsandbytes", "unsloth"):
        print(f"      {package:<14}{found.get(package, 'not installed (optional)')}")
    machine = provenance.machine()
    memory = log.size(machine["memory_bytes"])
    print(f"      {'machine':<14}{machine['cpus']} CPUs, {memory} memory, {machine['system']}")
    free = shutil.disk_usage(Path.home()).free
    enough = free >= MIN_FREE
    check(enough, "disk", f"{log.size(free)} free at home", "set runtime.cache_dir to another disk")
    return 0 if healthy else 1


def _check_torch(check: "object") -> None:
    import torch

    assert callable(check)
    build = "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPU"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            shown = f"{properties.name}, {log.size(properties.total_memory)} ({build})"
            check(True, f"gpu {index}", shown)
    else:
        print(f"      {'gpu':<14}none seen by torch's {build} build; the job runs on the CPU")

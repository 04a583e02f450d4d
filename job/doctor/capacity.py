"""Checks of memory, shared memory, and disk space for downloads and results."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from job import log
from job.distributed.cores import cores
from job.doctor.check import Check, fail, note, ok, warn
from job.doctor.subject import Subject
from job.engines import cpu
from job.errors import JobError
from job.planning.requirements import Needs
from job.planning.sizes import GIB, Sizes

SHM = Path("/dev/shm")  # noqa: S108 - a mount, not a file of ours
DOCKER_SHM = 64 * 2**20
"""A container's default shared memory; data loading workers crash with so little."""
MIN_FREE = GIB
"""Free disk space required without a spec, whose job may be a small one."""


def checks(subject: Subject) -> Iterator[Check]:
    gpus = _gpus(subject)
    try:
        measured = subject.measured(gpus)
    except JobError:
        measured = None  # the check of the model reports why
    need = measured[1] if measured else None
    yield memory(cpu.memory_limit(), need)
    workers = subject.spec.train.dataloader_num_workers if subject.spec else 0
    yield shared_memory(shutil.disk_usage(SHM).total if SHM.exists() else 0, need, workers)
    unknown = subject.spec is not None and subject.data_bytes is None
    yield from disks(subject.cache_dir, subject.workdir, measured, rows_unknown=unknown)


def memory(limit: int, need: Needs | None) -> Check:
    shown = f"{log.size(limit)}, {cores()} CPUs"
    if need is None:
        return note("memory", shown)
    if limit < need.memory:
        return warn(
            "memory",
            f"{shown}; the plan needs {log.size(need.memory)}",
            "provide more memory, or lower train.dataloader_num_workers; on a CPU also "
            "train.per_device_train_batch_size or train.max_length",
        )
    return ok("memory", f"{shown}; the plan needs {log.size(need.memory)}")


def shared_memory(total: int, need: Needs | None, workers: int) -> Check:
    fix = "docker's --shm-size 8g, or an emptyDir of medium Memory at /dev/shm"
    shown = log.size(total)
    if total <= DOCKER_SHM and workers:
        return fail("shared memory", f"{shown} for {workers} data loading processes", fix)
    if need is not None and total < need.shared_memory:
        found = f"{shown}; the plan needs {log.size(need.shared_memory)}"
        return warn("shared memory", found, fix)
    return ok("shared memory", shown)


def disks(
    cache: Path, work: Path, measured: tuple[Sizes, Needs] | None, *, rows_unknown: bool = False
) -> Iterator[Check]:
    """Checks disk space for downloads and results; files of earlier runs there count as free."""
    remark = "; rows that are not local are taken to be many" if rows_unknown else ""
    if measured is None:
        remark = "; `doctor SPEC` compares it with what a job needs"
        wanted = {"cache": (cache, MIN_FREE, 0)}
    else:
        sizes, need = measured
        wanted = {
            "cache": (cache, sizes.download, need.cache),
            "scratch": (work, sizes.merged + sizes.adapter, need.work),
        }
        if _device(cache) == _device(work):
            (_, *ones), (_, *others) = wanted["cache"], wanted["scratch"]
            least, planned = (one + other for one, other in zip(ones, others, strict=True))
            wanted = {"disk": (cache, least, planned)}
    for name, (path, least, planned) in wanted.items():
        # The plan of a local output has its scratch space on the cache's disk.
        yield _disk(name, path, least, max(least, planned) if measured else 0, remark)


def _disk(name: str, path: Path, least: int, planned: int, remark: str) -> Check:
    """`planned` is 0 without a plan."""
    key = "runtime.workdir" if name == "scratch" else "runtime.cache_dir"
    parent = _existing(path)
    if not os.access(parent, os.W_OK):
        fix = f"set {key} to a folder that this user can write, or change its owner"
        return fail(name, f"{path}: user {os.getuid()} may not write to {parent}", fix)
    fix = f"free space (python -m job clean), or set {key} to a folder on a larger disk"
    space = shutil.disk_usage(parent).free + _used(path)
    shown = f"{path}: {log.size(space)} available"
    if space < least:
        return fail(name, f"{shown}; at least {log.size(least)} needed", fix)
    needed = f"{shown}; the plan needs {log.size(planned)}" if planned else shown
    if space < planned:
        return warn(name, f"{needed}{remark}", fix)
    return ok(name, f"{needed}{remark}")


def _gpus(subject: Subject) -> int:
    import torch

    return int(subject.accelerator != "cpu" and torch.cuda.is_available())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _device(path: Path) -> int:
    return _existing(path).stat().st_dev


def _used(path: Path) -> int:
    used = 0
    for file in path.rglob("*"):
        with suppress(OSError):  # another job may be changing it
            used += file.stat().st_size if file.is_file() else 0
    return used

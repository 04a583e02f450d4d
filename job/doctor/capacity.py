"""Where the job keeps things: memory, shared memory, and disk for downloads and merged weights."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from job import log
from job.doctor.check import Check, fail, note, ok, warn
from job.doctor.subject import Subject
from job.engines import cpu
from job.errors import JobError
from job.planning.requirements import Needs
from job.planning.sizes import GIB, Sizes

SHM = Path("/dev/shm")  # noqa: S108 - a mount, not a file of ours
DOCKERS_SHM = 64 * 2**20
"""What a container has of shared memory unless more is asked for; workers die of it."""
MIN_FREE = 10 * GIB
"""Disk without a spec to say what is needed."""


def checks(subject: Subject) -> Iterator[Check]:
    gpus = _gpus(subject)
    try:
        measured = subject.measured(gpus)
    except JobError:
        measured = None  # the model's own check says why
    need = measured[1] if measured else None
    yield memory(cpu.memory_limit(), need)
    workers = subject.spec.train.dataloader_num_workers if subject.spec else 0
    yield shared_memory(shutil.disk_usage(SHM).total if SHM.exists() else 0, need, workers)
    yield from disks(subject.cache_dir, subject.workdir, measured)


def memory(limit: int, need: Needs | None) -> Check:
    shown = f"{log.size(limit)}, {cpu.cores()} CPUs"
    if need is None:
        return note("memory", shown)
    if limit < need.memory:
        return warn(
            "memory",
            f"{shown}; {log.size(need.memory)} are planned for",
            "give it more, or lower train.dataloader_num_workers; on a CPU also "
            "train.per_device_train_batch_size or train.max_length",
        )
    return ok("memory", f"{shown}; {log.size(need.memory)} planned for")


def shared_memory(total: int, need: Needs | None, workers: int) -> Check:
    fix = "docker's --shm-size 8g, or an emptyDir of medium Memory at /dev/shm"
    shown = log.size(total)
    if total <= DOCKERS_SHM and workers:
        return fail("shared memory", f"{shown} for {workers} data loading processes", fix)
    if need is not None and total < need.shared_memory:
        found = f"{shown}; {log.size(need.shared_memory)} are planned for"
        return warn("shared memory", found, fix)
    return ok("shared memory", shown)


def disks(cache: Path, work: Path, measured: tuple[Sizes, Needs] | None) -> Iterator[Check]:
    """Room for what is downloaded and what is made; what earlier runs left there counts as room."""
    if measured is None:
        wanted = {"cache": (cache, MIN_FREE, MIN_FREE)}
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
        yield _disk(name, path, least, planned)


def _disk(name: str, path: Path, least: int, planned: int) -> Check:
    key = "runtime.workdir" if name == "scratch" else "runtime.cache_dir"
    fix = f"free space (python -m job clean), or set {key} to a folder of a larger disk"
    there = _existing(path)
    if not os.access(there, os.W_OK):
        return fail(name, f"{path}: user {os.getuid()} may not write to {there}", fix)
    room = shutil.disk_usage(there).free + _used(path)
    shown = f"{path}: room for {log.size(room)}"
    if room < least:
        return fail(name, f"{shown}; {log.size(least)} are needed at the least", fix)
    if room < planned:
        return warn(name, f"{shown}; {log.size(planned)} are planned for", fix)
    return ok(name, f"{shown}; {log.size(planned)} planned for")


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
        with suppress(OSError):  # another job may be at work there
            used += file.stat().st_size if file.is_file() else 0
    return used

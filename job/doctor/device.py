"""The accelerator: its driver, the build of torch, and whether the two compute together."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from job import log
from job.doctor.check import Check, fail, note, ok
from job.doctor.subject import Subject
from job.errors import JobError

BUILDS = {"rocm": "ROCm", "cuda": "CUDA", "cpu": "CPU"}
INSTALL = "make setup ACCELERATOR={0} TORCH_INDEX=…, or take the image {0}"


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A kernel driver for GPUs, as the system's files tell of it."""

    accelerator: str
    """`rocm` or `cuda`."""
    version: str
    closed: tuple[str, ...] = ()
    """Its devices that this user may not open."""


def drivers(root: Path = Path("/")) -> list[Driver]:
    """The GPU drivers of the machine whose file system is at `root`."""
    found = []
    nvidia = _text(root / "proc/driver/nvidia/version")
    if nvidia:
        version = re.search(r"\s(\d+\.\d+[.\d]*)\s", nvidia)
        found.append(
            Driver(
                accelerator="cuda",
                version=version[1] if version else "unknown",
                closed=_closed(sorted((root / "dev").glob("nvidia[0-9c]*"))),
            )
        )
    kfd = root / "dev/kfd"
    if kfd.exists():
        version_text = _text(root / "sys/module/amdgpu/version") or "of the kernel"
        nodes = sorted((root / "dev/dri").glob("renderD*"))
        closed = _closed(nodes)
        if len(closed) < len(nodes):
            closed = ()  # one of them is enough; others may be no GPU's, or another job's
        found.append(
            Driver(accelerator="rocm", version=version_text, closed=_closed([kfd]) + closed)
        )
    return found


def checks(subject: Subject, root: Path = Path("/")) -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield fail("torch", f"cannot be loaded: {error}", "make setup")
        return
    built = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    there = drivers(root)
    yield from driver_checks(there, built, subject.accelerator)
    release = torch.version.hip or torch.version.cuda or ""
    yield ok("torch", f"{torch.__version__}, {BUILDS[built]} build {release}".rstrip())
    if subject.accelerator == "cpu":
        yield note("gpu", "not used: runtime.accelerator is cpu")
        return
    if not torch.cuda.is_available():
        wanted = subject.accelerator != "auto" or bool(there)
        yield (
            unseen(built, there, subject.accelerator)
            if wanted
            else note("gpu", "none; the job runs on the CPU")
        )
        return
    if subject.accelerator not in ("auto", built):
        found = f"of {BUILDS[built]}, and runtime.accelerator is {subject.accelerator}"
        yield fail("gpu", found, "set it to auto, or take the other image")
        return
    architectures = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        yield _compute(index, built, architectures)
    yield from _memory(subject)


def driver_checks(there: Sequence[Driver], built: str, accelerator: str) -> Iterator[Check]:
    """What the drivers say, and whether torch is a build for one of them."""
    if not there:
        yield note("driver", "no GPU driver on this machine")
        return
    for driver in there:
        shown = f"{'amdgpu' if driver.accelerator == 'rocm' else 'NVIDIA'} {driver.version}"
        if driver.closed and accelerator != "cpu":
            yield fail(
                "driver",
                f"{shown}: {', '.join(driver.closed)} cannot be opened by user {os.getuid()}",
                "add the groups that `stat -c %g` tells of them: docker's --group-add, "
                "a pod's supplementalGroups",
            )
        else:
            yield ok("driver", shown)
    kinds = {driver.accelerator for driver in there}
    if accelerator != "cpu" and built not in kinds:
        yield fail(
            "torch",
            f"is a {BUILDS[built]} build, and the machine has the driver for "
            f"{' and '.join(BUILDS[kind] for kind in sorted(kinds))}",
            INSTALL.format(sorted(kinds)[0]),
        )


def unseen(built: str, there: Sequence[Driver], accelerator: str) -> Check:
    """Why torch sees no GPU where one is asked for or must be there."""
    asked = "" if accelerator == "auto" else f", and runtime.accelerator is {accelerator}"
    if not there:
        fix = "run on a node with a GPU; in a container, pass the device (a pod asks for it)"
    elif built == "cuda":
        fix = "a driver at least as new as torch's CUDA needs; is the device passed on?"
    else:
        fix = "is /dev/kfd passed on and may it be opened? does this ROCm know the device?"
    return fail("gpu", f"torch sees none{asked}", fix)


def covered(architecture: str, built: Sequence[str]) -> bool:
    """Whether a build of torch has code for a device: `gfx942`, or `sm_90` with its relatives.

    Code for CUDA runs on devices of the same major version and a higher minor one, and a
    `compute_` entry is compiled for any later device.
    """
    if not architecture.startswith("sm_"):
        return architecture in built
    major, minor = _capability(architecture)
    for name in built:
        kind = name.partition("_")[0]
        found = _capability(name)
        if kind == "sm" and found[0] == major and found[1] <= minor:
            return True
        if kind == "compute" and found <= (major, minor):
            return True
    return False


def _compute(index: int, built: str, architectures: Sequence[str]) -> Check:
    import torch

    properties = torch.cuda.get_device_properties(index)
    if built == "rocm":
        architecture = properties.gcnArchName.partition(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    name = f"gpu {index}"
    shown = f"{properties.name}, {architecture}, {log.size(properties.total_memory)}"
    if not covered(architecture, architectures):
        return fail(
            name,
            f"{shown}: torch has no code for it, only for {' '.join(architectures)}",
            f"take the package index of a {BUILDS[built]} release that supports it as TORCH_INDEX",
        )
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        total = float((ones @ ones).sum())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return fail(name, f"{shown}: it does not compute: {reason}", "look at the node's dmesg")
    if total != 64.0**3:
        return fail(name, f"{shown}: it computes wrongly", "take the node out of service")
    free, _ = torch.cuda.mem_get_info(index)
    return ok(name, f"{shown} ({log.size(free)} free); it computes")


def _memory(subject: Subject) -> Iterator[Check]:
    """Whether the frozen weights fit, which is the least that training takes."""
    import torch

    from job.planning.sizes import BYTES

    assert torch.cuda.is_available()
    try:
        found = subject.measured(1)
    except JobError:
        return  # the model's own check says it
    if found is None or subject.spec is None:
        return
    dtype = subject.spec.model.dtype
    default = "float32" if subject.spec.lora.method == "full" else "bfloat16"
    weights = found[0].parameters * BYTES[default if dtype == "auto" else dtype]
    total = torch.cuda.get_device_properties(0).total_memory
    shown = f"{log.size(total)}; the weights alone take {log.size(weights)}"
    if weights > total:
        yield fail("gpu memory", shown, "take a larger GPU, or a smaller model")
    else:
        yield ok("gpu memory", shown)


def _capability(name: str) -> tuple[int, int]:
    digits = re.sub(r"\D", "", name)
    return int(digits[:-1]), int(digits[-1])


def _closed(nodes: Sequence[Path]) -> tuple[str, ...]:
    return tuple(str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

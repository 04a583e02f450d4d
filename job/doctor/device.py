"""Checks of the accelerator: the driver, the build of torch, and a test computation."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from job import log
from job.doctor.check import Check, fail, note, ok
from job.doctor.subject import Subject
from job.engines import ways
from job.engines.device import BUILDS, build, gpu
from job.errors import JobError

INSTALL = "make setup ACCELERATOR={0} TORCH_INDEX=…, or use the image {0}"


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A GPU kernel driver, as found in /proc, /sys and /dev."""

    accelerator: str
    """`rocm` or `cuda`."""
    version: str
    inaccessible: tuple[str, ...] = ()
    """Device files that this user may not open."""


def drivers(root: Path = Path("/")) -> list[Driver]:
    """Finds the GPU drivers of this machine; `root` is the file system root, for tests."""
    found = []
    nvidia = _text(root / "proc/driver/nvidia/version")
    if nvidia:
        version = re.search(r"\s(\d+\.\d+[.\d]*)\s", nvidia)
        found.append(
            Driver(
                accelerator="cuda",
                version=version[1] if version else "unknown",
                inaccessible=_inaccessible(sorted((root / "dev").glob("nvidia[0-9c]*"))),
            )
        )
    kfd = root / "dev/kfd"
    if kfd.exists():
        version_text = _text(root / "sys/module/amdgpu/version") or "of the kernel"
        nodes = sorted((root / "dev/dri").glob("renderD*"))
        inaccessible = _inaccessible(nodes)
        if len(inaccessible) < len(nodes):
            inaccessible = ()  # one is enough: others may belong to another job, or not be GPUs
        found.append(
            Driver(
                accelerator="rocm",
                version=version_text,
                inaccessible=_inaccessible([kfd]) + inaccessible,
            )
        )
    return found


def checks(subject: Subject, root: Path = Path("/")) -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield fail("torch", f"cannot be loaded: {error}", "make setup")
        return
    built = build()
    installed = drivers(root)
    yield from driver_checks(installed, built, subject.accelerator)
    release = getattr(torch.version, {"rocm": "hip"}.get(built, "cuda")) or ""
    yield ok("torch", f"{torch.__version__}, {BUILDS[built]} build {release}".rstrip())
    if subject.accelerator == "cpu":
        yield note("gpu", "not used: runtime.accelerator is cpu")
        return
    if not torch.cuda.is_available():
        wanted = subject.accelerator != "auto" or bool(installed)
        yield (
            no_gpu(built, installed, subject.accelerator)
            if wanted
            else note("gpu", "none; the job runs on the CPU")
        )
        return
    if subject.accelerator not in ("auto", built):
        found = f"{BUILDS[built]}, but runtime.accelerator is {subject.accelerator}"
        yield fail("gpu", found, "set it to auto, or use the other image")
        return
    architectures = torch.cuda.get_arch_list()
    computed = [_compute(i, built, architectures) for i in range(torch.cuda.device_count())]
    yield from computed
    yield from _memory(subject)
    if not any(check.state == "fail" for check in computed):
        yield from ways_of(ways.find(gpu(0), subject.cache_dir, anew=True))


def ways_of(found: ways.Ways) -> Iterator[Check]:
    """A line for each way to compute that was tried: none that is left makes a run fail."""
    for outcome in found.outcomes:
        yield (ok if outcome.taken else note)("way", f"{outcome.way}: {outcome}")


def driver_checks(installed: Sequence[Driver], built: str, accelerator: str) -> Iterator[Check]:
    """Checks the drivers, and that torch is built for one of them."""
    if not installed:
        yield note("driver", "no GPU driver on this machine")
        return
    for driver in installed:
        shown = f"{'amdgpu' if driver.accelerator == 'rocm' else 'NVIDIA'} {driver.version}"
        if driver.inaccessible and accelerator != "cpu":
            files = ", ".join(driver.inaccessible)
            yield fail(
                "driver",
                f"{shown}: {files} cannot be opened by user {os.getuid()}",
                "add the groups that `stat -c %g` prints for them: docker's --group-add, "
                "a pod's supplementalGroups",
            )
        else:
            yield ok("driver", shown)
    kinds = {driver.accelerator for driver in installed}
    if accelerator != "cpu" and built not in kinds:
        yield fail(
            "torch",
            f"is a {BUILDS[built]} build, but the machine has the driver for "
            f"{' and '.join(BUILDS[kind] for kind in sorted(kinds))}",
            INSTALL.format(sorted(kinds)[0]),
        )


def no_gpu(built: str, installed: Sequence[Driver], accelerator: str) -> Check:
    """A `fail`: torch sees no GPU although one is required or installed."""
    required = "" if accelerator == "auto" else f", but runtime.accelerator is {accelerator}"
    if not installed:
        fix = "run on a node with a GPU; in a container, pass the device (a pod requests it)"
    elif built == "cuda":
        fix = "install a driver new enough for torch's CUDA; in a container, pass the device"
    else:
        fix = "pass /dev/kfd and allow opening it; check that this ROCm supports the device"
    return fail("gpu", f"torch sees none{required}", fix)


def is_supported(architecture: str, built: Sequence[str]) -> bool:
    """Whether a build of torch has code for a device such as `gfx942` or `sm_90`: why a product
    failed, not whether it may be tried.

    CUDA code also runs on devices with the same major and a higher minor version, and a `compute_`
    entry is compiled for any later device.
    """
    if not architecture.startswith("sm_"):
        return architecture in built
    major, minor = _capability(architecture)
    for name in built:
        kind = name.partition("_")[0]
        capability = _capability(name)
        if kind == "sm" and capability[0] == major and capability[1] <= minor:
            return True
        if kind == "compute" and capability <= (major, minor):
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
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        total = float((ones @ ones).sum())
    except RuntimeError as error:
        if not is_supported(architecture, architectures):
            return fail(
                name,
                f"{shown}: torch has no code for it, only for {' '.join(architectures)}",
                f"set TORCH_INDEX to the package index of a {BUILDS[built]} release that supports "
                "it",
            )
        reason = str(error).splitlines()[0]
        return fail(name, f"{shown}: a matrix product fails: {reason}", "check the node's dmesg")
    if total != 64.0**3:
        return fail(name, f"{shown}: wrong matrix product", "take the node out of service")
    free, _ = torch.cuda.mem_get_info(index)
    return ok(name, f"{shown} ({log.size(free)} free); works")


def _memory(subject: Subject) -> Iterator[Check]:
    """Checks that the model's weights fit, the minimum for training."""
    import torch

    from job.planning.sizes import BYTES

    assert torch.cuda.is_available()
    try:
        measured = subject.measured(1)
    except JobError:
        return  # the model's own check reports it
    if measured is None or subject.spec is None:
        return
    dtype = subject.spec.model.dtype
    default = "float32" if subject.spec.lora.method == "full" else "bfloat16"
    weights = measured[0].parameters * BYTES[default if dtype == "auto" else dtype]
    total = torch.cuda.get_device_properties(0).total_memory
    shown = f"{log.size(total)}; the weights alone take {log.size(weights)}"
    if weights > total:
        yield fail("gpu memory", shown, "use a larger GPU, or a smaller model")
    else:
        yield ok("gpu memory", shown)


def _capability(name: str) -> tuple[int, int]:
    digits = re.sub(r"\D", "", name)
    return int(digits[:-1]), int(digits[-1])


def _inaccessible(nodes: Sequence[Path]) -> tuple[str, ...]:
    return tuple(str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

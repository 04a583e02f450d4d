"""What trials found, kept in the cache for a device and all that could change it."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from job import __version__, log
from job.engines.device import Accelerator
from job.local import lock as locks
from job.storage import local

if TYPE_CHECKING:
    from job.families.outcome import Outcome

FOLDER = "ways"
PACKAGES = ("torch", "triton", "pytorch-triton-rocm", "transformers", "bitsandbytes")
DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
VARIABLES = (
    *("AMD_", "BNB_", "CUBLAS", "CUDA_", "CUDNN_", "HIP", "HSA_", "INDUCTOR_", "NVIDIA_TF32"),
    *("ROCBLAS_", "ROCM_", "TORCH", "TRITON_"),
)
"""Prefixes of environment variables that change which kernels run."""
OTHERS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TORCHELASTIC_", "TORCH_NCCL_")
"""Prefixes among these of variables that select a device of the same kind, or are of a launcher."""
VERDICTS = "2"
"""The rules by which a way is kept; other rules keep nothing of what these found."""


def key(accelerator: Accelerator) -> Mapping[str, str]:
    """The device, versions, compiler and variables that a finding depends on."""
    versions = {name: found for name in PACKAGES if (found := _version(name)) is not None}
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES) and not name.startswith(OTHERS)
    }
    return {
        "verdicts": VERDICTS,
        "device": accelerator.name,
        "memory": str(accelerator.memory_bytes),
        "job": __version__,
        "python": platform.python_version(),
        **versions,
        "driver": " ".join(_text(Path(path)) for path in DRIVERS).strip(),
        "compiler": shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or "none",
        **variables,
    }


def read(cache: Path, key: Mapping[str, str]) -> "dict[str, Outcome]":
    """The outcomes by trial; empty if none are kept, or they cannot be read."""
    from job.families.outcome import Outcome

    try:
        stored = json.loads(_path(cache, key).read_text(encoding="utf-8"))
        return {name: Outcome(**each) for name, each in stored["ways"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(cache: Path, key: Mapping[str, str], ways: "Mapping[str, Outcome]") -> None:
    """Keeps the outcomes; a cache that cannot be written costs another trial."""
    found = {name: outcome.to_json() for name, outcome in ways.items()}
    text = json.dumps({"key": dict(key), "ways": found}, indent=1)
    try:
        _path(cache, key).parent.mkdir(parents=True, exist_ok=True)
        local.write(_path(cache, key), f"{text}\n".encode())
    except OSError as error:
        log.debug("what the trials of ways found is not kept", reason=str(error))


@contextmanager
def one_at_a_time(cache: Path | None, key: Mapping[str, str]) -> Iterator[None]:
    """Lets one process of a machine try while the others wait for what it finds."""
    lock = None
    if cache is not None:
        with suppress(OSError):  # without locks each process tries for itself
            _path(cache, key).parent.mkdir(parents=True, exist_ok=True)
            lock = locks.wait(_path(cache, key).with_suffix(".lock"))
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _path(cache: Path, key: Mapping[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    return cache / FOLDER / f"{digest}.json"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

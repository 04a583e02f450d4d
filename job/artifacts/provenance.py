"""The provenance of a result: package versions, code revision, machine."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from job import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "unsloth",
    "fsspec",
    "boto3",
)


def versions() -> dict[str, str]:
    """Versions by package, with the git revision of `job`."""
    installed = {"job": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    revision = source_revision()
    if revision is not None:
        installed["source_revision"] = revision
    return installed


def source_revision() -> str | None:
    """The git commit of the code: from its checkout, or from its container's label."""
    labelled = os.environ.get("JOB_SOURCE_REVISION")
    if labelled:
        return labelled
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def machine() -> dict[str, Any]:
    """The machine of the run, as far as it is known without importing torch."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
    }

"""Where a result comes from: versions of the packages, revision of the code, the machine."""

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
    """The versions that made a result, by package; `job` with its git revision."""
    found = {"job": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    revision = source_revision()
    if revision is not None:
        found["source_revision"] = revision
    return found


def source_revision() -> str | None:
    """The git commit of the code: of its checkout, or as its container was labelled."""
    labelled = os.environ.get("JOB_SOURCE_REVISION")
    if labelled:
        return labelled
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def machine() -> dict[str, Any]:
    """The machine that makes the run, as far as it can be told without loading torch."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
    }

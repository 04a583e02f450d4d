"""The provenance of a result: package versions, code revision, machine."""

import json
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from job import __version__

PACKAGE = "finetune-job"
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
    installed["source_revision"] = source_revision()
    return installed


def source_revision() -> str:
    """The git commit of the code, or its version if the commit is unknown.

    From the container's label, the checkout that the code is in, or the record that pip leaves of
    an installation from a repository.
    """
    return (
        os.environ.get("JOB_SOURCE_REVISION")
        or _checked_out()
        or _installed_from()
        or f"v{__version__}"
    )


def _checked_out() -> str | None:
    """The commit of the checkout that tracks this file.

    A package that was installed into the folder of another repository has none.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    if _git(root, "ls-files", "--error-unmatch", "--", __file__) is None:
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=12")


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None if it prints nothing or fails."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None


def _installed_from() -> str | None:
    """The commit that pip installed from: `pip install git+https://…` records it."""
    with suppress(PackageNotFoundError, ValueError, KeyError, TypeError):
        record = distribution(PACKAGE).read_text("direct_url.json")
        return str(json.loads(record or "")["vcs_info"]["commit_id"])[:12]
    return None


def machine() -> dict[str, Any]:
    """The machine of the run, as far as it is known without importing torch."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
    }

"""Checks of Python, and of its packages against the lock files."""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from job.artifacts import sbom
from job.doctor.check import Check, attempt, fail, note, ok, warn
from job.spec.types import JobSpec

LOCKS = Path(__file__).resolve().parents[2] / "requirements"
REQUIRED = ("base", "torch")
"""Locks that must be installed in full; packages of the others are optional."""
SETUP = "make setup, or rebuild the image"
SHOWN = 4


def checks(spec: JobSpec | None) -> Iterator[Check]:
    version = sys.version.split()[0]
    if (3, 11) <= sys.version_info < (3, 13):
        yield ok("python", version)
    else:
        yield fail("python", version, "use Python 3.11 or 3.12")
    yield packages(LOCKS, installed())
    if spec is not None and spec.train.report_to:
        yield attempt("trackers", lambda: _trackers(spec))
    if spec is not None and spec.export.verify == "vllm":
        yield attempt("vllm", _vllm)


def packages(locks: Path, found: Mapping[str, str]) -> Check:
    """Compares the installed packages with the locks in the folder."""
    pins = {lock.stem: _pins(lock) for lock in sorted(locks.glob("*.txt"))}
    if not set(REQUIRED) <= set(pins):
        return note("packages", f"{len(found)} installed; no lock files found next to the code")
    wanted = {name: pin for lock in REQUIRED for name, pin in pins[lock].items()}
    # Other builds of torch need other libraries than those locked for the default one.
    if _build(found):
        wanted = {**pins["base"], **{name: wanted[name] for name in ("torch", "torchvision")}}
    for lock in ("gpu", "trackers", "unsloth"):
        wanted |= {name: pin for name, pin in pins.get(lock, {}).items() if name in found}
    missing = [name for name in wanted if name not in found]
    if missing:
        return fail("packages", f"missing: {_some(missing)}", SETUP)
    other = [
        f"{name} {found[name]} (locked: {pin})"
        for name, pin in wanted.items()
        if found[name].partition("+")[0] != pin
    ]
    if other:
        return warn("packages", f"not as locked: {_some(other)}", SETUP)
    return ok("packages", f"{len(wanted)} as locked")


def _trackers(spec: JobSpec) -> str:
    from job.train import trackers

    trackers.require(spec.train.report_to)
    return ", ".join(spec.train.report_to)


def _vllm() -> str:
    from job.export import vllm_server

    vllm_server.require_vllm()
    return f"installed for {vllm_server.interpreter()}"


def installed() -> dict[str, str]:
    """Versions by normalized package name."""
    return {name: package.version for name, package in sbom.packages().items()}


def _pins(lock: Path) -> dict[str, str]:
    lines = lock.read_text(encoding="utf-8").splitlines()
    pairs = (re.match(r"([\w.-]+)==([^ ;]+)", line) for line in lines)
    return {sbom.normal(pair[1]): pair[2] for pair in pairs if pair}


def _build(found: Mapping[str, str]) -> str:
    """The build of torch, from its local version: `rocm7.2`; empty for the plain wheels."""
    return found.get("torch", "").partition("+")[2]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

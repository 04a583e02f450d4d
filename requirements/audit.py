"""Audits the lock files: exact pins, licences that are allowed, no version that is vulnerable.

    python requirements/audit.py [--service URL] [--locks FOLDER]       (`make audit`)

What is allowed and what is known without a network stands in `audit.toml`; pip-audit asks the
service that knows the rest. Licences are those of the packages installed where this runs.

Exit codes: 0 nothing is wrong; 1 something is, a line each; 3 nothing is wrong as far as it is
known here, but the service gave no answer, or none for some packages.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from job.artifacts.sbom import Package, normal, read_metadata  # noqa: E402

CLEAN, FOUND, UNANSWERED = 0, 1, 3
LONGEST = 300  # seconds that the service has for one set of pins
_NAME, _VERSION = r"[a-z0-9][a-z0-9._-]*", r"[a-z0-9][a-z0-9.+!_-]*"
_PIN = re.compile(f"(?P<name>{_NAME})={{2,3}}(?P<version>{_VERSION})")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One line of a lock."""

    lock: str
    name: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the service said: what it found, and what it could not be asked."""

    found: tuple[str, ...]
    unanswered: tuple[str, ...]


def pins(locks: Path) -> tuple[list[Pin], list[str]]:
    """Every pin of the locks in the folder, and the lines that are none."""
    good, bad = [], []
    for path in sorted(locks.glob("*.txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("#") or not line.strip():
                continue
            if match := _PIN.fullmatch(line):
                good.append(Pin(lock=path.name, name=match["name"], version=match["version"]))
            else:
                bad.append(f"{path.name}:{number}: {line}: is no exact pin, name==version")
    return good, bad


def licences(locked: Iterable[Pin], policy: Mapping[str, Any], site: Sequence[str]) -> list[str]:
    """The installed packages of the locks whose licence is not allowed."""
    wanted = {normal(pin.name) for pin in locked}
    found = []
    for package in distributions(path=list(site)):
        name = normal(package.name or "")
        if name in wanted and name not in policy["packages"]:
            stated = Package(version=package.version, metadata=read_metadata(package)).licence
            if not allowed(stated, policy["licences"]):
                found.append(f"{name} {package.version}: its licence is not allowed: {stated}")
    return sorted(found)


def allowed(stated: str | None, licences: Sequence[str]) -> bool:
    """Whether the licence is on the list; of an expression, one of `OR` and all of `AND`."""
    if stated is None or stated in licences:
        return stated is not None
    if " OR " in stated:
        return any(allowed(part, licences) for part in stated.split(" OR "))
    if " AND " in stated:
        return all(allowed(part, licences) for part in stated.split(" AND "))
    return " WITH " in stated and allowed(stated.partition(" WITH ")[0], licences)


def advisories(locked: Iterable[Pin], policy: Mapping[str, Any]) -> list[str]:
    """The pins that a known advisory is about."""
    return [
        f"{pin.lock}: {pin.name} {pin.version}: {known['id']}: {known['summary']} "
        f"(affected: {known['affected']})"
        for pin in locked
        for known in policy["advisories"]
        if normal(pin.name) == known["package"]
        and SpecifierSet(known["affected"], prereleases=True).contains(pin.version)
    ]


def ask(locked: Iterable[Pin], policy: Mapping[str, Any], service: str | None) -> Answer:
    """What pip-audit learns from the service (OSV, or another at the URL `service`) of the pins."""
    every = sorted({(pin.name, pin.version) for pin in locked})
    found, unanswered = list[str](), list[str]()
    for batch in _batches(every):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.writelines(f"{name}=={version}\n" for name, version in batch)
            file.flush()
            command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv"]
            command += ["--no-deps", "--disable-pip", "--progress-spinner", "off"]
            command += ["--format", "json", "--requirement", file.name]
            command += ["--osv-url", service] if service else []
            answer, reason = _answer(command)
        if answer is None:
            return Answer(found=tuple(found), unanswered=(f"the service gave no answer: {reason}",))
        for package in answer:
            if "skip_reason" in package:
                unanswered.append(f"not answered: {package['skip_reason']}")
            for known in package.get("vulns", ()):
                if not {known["id"], *known.get("aliases", ())} & policy["accepted"].keys():
                    fixed = ", ".join(known.get("fix_versions", ())) or "no version yet"
                    found.append(
                        f"{package['name']} {package['version']}: {known['id']} (fixed in: {fixed})"
                    )
    return Answer(found=tuple(found), unanswered=tuple(unanswered))


def _answer(command: Sequence[str]) -> tuple[list[dict[str, Any]] | None, str]:
    """What pip-audit printed; or None and why."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)  # noqa: S603
        return json.loads(done.stdout)["dependencies"], ""
    except subprocess.TimeoutExpired:
        return None, f"not within {LONGEST} seconds"
    except (ValueError, KeyError):  # it ended with a traceback, whose last line says why
        return None, (done.stderr.strip() or "no output").splitlines()[-1]


def _batches(every: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The pins in sets that name no package twice: serving pins other versions than training."""
    left = list(every)
    while left:
        batch = dict(reversed(left))
        yield sorted(batch.items())
        left = [pin for pin in left if batch[pin[0]] != pin[1]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Audits the lock files.")
    parser.add_argument("--locks", type=Path, default=HERE, help="the folder of the locks")
    parser.add_argument("--site", nargs="*", default=sys.path, help="where packages are installed")
    parser.add_argument("--service", help="the URL of a service that speaks as OSV does")
    given = parser.parse_args()
    policy = tomllib.loads((HERE / "audit.toml").read_text(encoding="utf-8"))
    locked, found = pins(given.locks)
    found += licences(locked, policy, given.site) + advisories(locked, policy)
    answer = ask(locked, policy, given.service)
    found += answer.found
    for line in found:
        print(f"FOUND    {line}")
    for line in answer.unanswered:
        print(f"UNKNOWN  {line}", file=sys.stderr)
    print(f"audit: {len(locked)} pins, {len(found)} findings, {len(answer.unanswered)} unknown")
    return FOUND if found else UNANSWERED if answer.unanswered else CLEAN


if __name__ == "__main__":
    sys.exit(main())

"""The packages of a run's environment as a CycloneDX SBOM, in JSON.

Version and licence come from each package's metadata; scanners look up the rest by its purl.
"""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from typing import Any
from urllib.parse import quote

from job import __version__
from job.redaction import as_json

_NAME = "finetune-job"
_MAX_LICENCE = 100  # a longer field is the text of the licence


def to_text() -> str:
    """The SBOM of this process's environment, deterministic."""
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _component("application", _NAME, __version__, _NAME)},
        "components": list(_components()),
    }
    return as_json(bom, indent=2) + "\n"


def licence(package: Distribution) -> str | None:
    """The licence from the package's metadata: an SPDX expression if it has one."""
    if expression := _expression(package):
        return expression
    stated = _metadata(package, "License") or ""
    if stated and "\n" not in stated and len(stated) <= _MAX_LICENCE and stated != "UNKNOWN":
        return stated
    classifiers = package.metadata.get_all("Classifier") or []
    named = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")]
    return " OR ".join(sorted({*named} - {"OSI Approved"})) or None


def _expression(package: Distribution) -> str | None:
    return _metadata(package, "License-Expression")


def _metadata(package: Distribution, key: str) -> str | None:
    return next(iter(package.metadata.get_all(key) or ()), None)


def normal(name: str) -> str:
    """A package's normalized name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages() -> dict[str, Distribution]:
    """Installed packages by normalized name."""
    installed: dict[str, Distribution] = {}
    for package in distributions():
        name = _metadata(package, "Name")
        # Interrupted installations have no name; the job itself is not a dependency.
        if name is not None and normal(name) != _NAME:
            installed.setdefault(normal(name), package)  # the first is the one imported
    return installed


def _components() -> Iterator[dict[str, Any]]:
    python = platform.python_version()
    yield _component("platform", platform.python_implementation(), python, f"python@{python}")
    for name, package in sorted(packages().items()):
        purl = f"pkg:pypi/{name}@{quote(package.version, safe='.-_~')}"
        component = _component("library", name, package.version, purl)
        if expression := _expression(package):
            component["licenses"] = [{"expression": expression}]
        elif stated := licence(package):
            component["licenses"] = [{"license": {"name": stated}}]
        yield {**component, "purl": purl}


def _component(kind: str, name: str, version: str, reference: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": reference, "name": name, "version": version}

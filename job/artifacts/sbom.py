"""The packages of a run's environment as a CycloneDX SBOM, in JSON.

Version and licence come from each package's metadata; scanners look up the rest by its purl.
"""

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, distributions
from operator import itemgetter
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


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package."""

    version: str
    metadata: Message

    @property
    def expression(self) -> str | None:
        """The licence as an SPDX expression."""
        return self.metadata["License-Expression"]

    @property
    def licence(self) -> str | None:
        """The licence: an SPDX expression if the metadata have one, else what they state."""
        if self.expression:
            return self.expression
        stated = self.metadata["License"] or ""
        if stated and "\n" not in stated and len(stated) <= _MAX_LICENCE and stated != "UNKNOWN":
            return stated
        classifiers = self.metadata.get_all("Classifier") or []
        named = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")]
        return " OR ".join(sorted({*named} - {"OSI Approved"})) or None


def normal(name: str) -> str:
    """A package's normalized name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages() -> dict[str, Package]:
    """Installed packages by normalized name."""
    installed: dict[str, Package] = {}
    for distribution in distributions():
        metadata = read_metadata(distribution)
        # Interrupted installations have no name; the job itself is not a dependency.
        if (name := metadata["Name"]) is not None and normal(name) != _NAME:
            package = Package(version=metadata["Version"], metadata=metadata)
            installed.setdefault(normal(name), package)  # the first is the one imported
    return installed


def read_metadata(distribution: Distribution) -> Message:
    """The fields of a package's metadata.

    `Distribution.metadata` parses the description too, anew at every access, which took seconds for
    all packages.
    """
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return HeaderParser().parsestr(text.partition("\n\n")[0])


def _components() -> Iterator[dict[str, Any]]:
    python = platform.python_version()
    yield _component("platform", platform.python_implementation(), python, f"python@{python}")
    for name, package in sorted(packages().items(), key=itemgetter(0)):
        purl = f"pkg:pypi/{name}@{quote(package.version, safe='.-_~')}"
        component = _component("library", name, package.version, purl)
        if package.expression:
            component["licenses"] = [{"expression": package.expression}]
        elif package.licence:
            component["licenses"] = [{"license": {"name": package.licence}}]
        yield {**component, "purl": purl}


def _component(kind: str, name: str, version: str, reference: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": reference, "name": name, "version": version}

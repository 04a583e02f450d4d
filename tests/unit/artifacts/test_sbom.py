"""The SBOM of a run: valid CycloneDX, and true of the environment."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from job import __version__
from job.artifacts import sbom
from tests.jobs import ROOT

CYCLONEDX = JsonStrictValidator(SchemaVersion.V1_6)


def test_it_is_what_cyclonedx_says_it_is() -> None:
    text = sbom.to_text()
    assert CYCLONEDX.validate_str(text) is None
    assert CYCLONEDX.validate_str(text.replace('"library"', '"librery"')) is not None


def test_it_names_the_job_python_and_every_locked_package() -> None:
    bom = json.loads(sbom.to_text())
    assert bom["metadata"]["component"]["version"] == __version__
    versions = {sbom.normal(each["name"]): each["version"] for each in bom["components"]}
    assert versions["cpython"] == platform.python_version()
    locked = [
        line.split("==")
        for name in ("base", "torch")
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        if "==" in line
    ]
    assert {name for name, _ in locked} <= versions.keys()
    assert all(versions[name] == version(name) for name, _ in locked)


def test_each_package_has_its_purl_and_nearly_each_a_licence() -> None:
    packages = [e for e in json.loads(sbom.to_text())["components"] if e["type"] == "library"]
    purls = {each["purl"] for each in packages}
    assert f"pkg:pypi/huggingface-hub@{version('huggingface_hub')}" in purls
    assert len(purls) == len(packages)
    assert sum("licenses" in each for each in packages) > 0.9 * len(packages)


def test_the_same_environment_gives_the_same_bytes() -> None:
    assert sbom.to_text() == sbom.to_text()


@pytest.mark.parametrize(
    ("metadata", "licences"),
    [
        ("License-Expression: MIT OR Zlib", [{"expression": "MIT OR Zlib"}]),
        ("License: BSD", [{"license": {"name": "BSD"}}]),
        (
            "License: UNKNOWN\nClassifier: License :: OSI Approved :: MIT License",
            [{"license": {"name": "MIT License"}}],
        ),
        ("License: " + "a whole text " * 20, None),
        ("Summary: nothing said", None),
    ],
)
def test_odd_packages_are_listed_with_what_they_say(
    metadata: str, licences: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name in (("odd-1.dist-info", "Name: Odd.Name\n"), ("broken-2.dist-info", "")):
        (tmp_path / folder).mkdir()
        head = f"Metadata-Version: 2.4\n{name}Version: 1.0+local\n"
        (tmp_path / folder / "METADATA").write_text(head + metadata + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = sbom.to_text()
    assert CYCLONEDX.validate_str(text) is None
    [odd] = [e for e in json.loads(text)["components"] if e["name"] == "odd-name"]
    assert odd["purl"] == "pkg:pypi/odd-name@1.0%2Blocal"
    assert odd.get("licenses") == licences

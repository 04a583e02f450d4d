"""The manifests of the pages about Kubernetes: each command on them runs, and is valid."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest
import yaml

from job.cli.app import app
from job.kubernetes import constants
from job.kubernetes.cluster_options import OPTIONS
from tests import manifest_lint
from tests.jobs import ROOT
from tests.manifest_lint import schemas

OPTIONS_PAGE = ROOT / "docs/22-cluster-options.md"
PAGES = [*sorted((ROOT / "docs").glob("*kubernetes-*.md")), OPTIONS_PAGE]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `job manifest` of the pages: its page, and its arguments with the shell's variables."""
    for page in PAGES:
        names: dict[str, str] = {}
        for line in "".join(blocks(page, "bash")).splitlines():
            if line.startswith("export "):
                names |= dict(word.split("=", 1) for word in shlex.split(line)[1:])
            if line.startswith("python -m job manifest "):
                text = re.split(r" [|>] ", Template(line).safe_substitute(names))[0]
                yield page.name, shlex.split(text)[3:]


def test_every_manifest_of_the_pages_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("specs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "cluster.yaml").write_text(blocks(OPTIONS_PAGE, "yaml")[0])
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    found = list(commands())
    assert {page for page, _ in found} == {
        page.name for page in PAGES if "job manifest" in "".join(blocks(page, "bash"))
    }
    assert len(found) >= 10
    for page, arguments in found:
        app(arguments, standalone_mode=False)
        documents = list(yaml.safe_load_all(capsys.readouterr().out))
        for document in documents:
            schemas.check(document, constants.NEWEST_KUBERNETES)
        problems = manifest_lint.problems(documents)
        # The smoke test's policy names the server's pods, which are in a manifest of their own.
        assert [line for line in problems if "vllm-smoke" not in line] == [], (page, arguments)


def test_the_page_of_options_has_every_option() -> None:
    text = OPTIONS_PAGE.read_text()
    table = text.partition("| option |")[2].partition("\n## ")[0]
    listed = set(re.findall(r"--([a-z-]+)", "".join(re.findall(r"^\| (`--.*?) \|", table, re.M))))
    assert listed == {*OPTIONS}

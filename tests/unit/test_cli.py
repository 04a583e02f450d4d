"""What options of a command make of the spec."""

import pytest

from job import launch
from job.cli import app
from job.errors import SpecError
from job.spec import keys
from job.spec.load import LoadedSpec
from tests.jobs import ROOT

SPEC = str(ROOT / "specs" / "latex.yaml")


def run(*words: str) -> None:
    app(list(words), standalone_mode=False)


@pytest.mark.parametrize("proof", keys.at(("export", "verify"))["enum"])  # type: ignore[index]
def test_export_takes_its_proof_from_its_option_before_the_spec_and_its_overrides(
    proof: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def started(loaded: LoadedSpec, command: str) -> None:
        seen.append((command, loaded.spec.export.verify))

    monkeypatch.setattr(launch, "launch", started)
    run("export", SPEC, "--set", "export.verify=reload", "--verify", proof)
    run("export", SPEC, "--set", f"export.verify={proof}")
    assert seen == [("export", proof)] * 2


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("export", SPEC, "--verify", "vlm"), "--verify"),
        (("infer", SPEC, "--image", "x.png", "--temperature", "0"), "--temperature"),
        (("infer", SPEC, "--image", "x.png", "--min-p", "2"), "--min-p"),
        (("infer", SPEC, "--image", "x.png", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("validate", SPEC, "--output", "hf://a/b"), "--output"),
    ],
)
def test_what_an_option_says_wrongly_is_told_of_the_option(
    words: tuple[str, ...], option: str
) -> None:
    with pytest.raises(SpecError) as caught:
        run(*words)
    assert [problem.field for problem in caught.value.problems] == [option]

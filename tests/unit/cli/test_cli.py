"""What options of a command make of the spec."""

import re

import pytest

from job.cli import launch
from job.cli.app import app
from job.errors import SpecError
from job.spec import keys
from job.spec.load import LoadedSpec
from tests.jobs import ROOT, Finished, job
from tests.terminal import Shown, job_on_terminal

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
        (("validate", SPEC, "--output", "http://a/b"), "--output"),
    ],
)
def test_what_an_option_says_wrongly_is_told_of_the_option(
    words: tuple[str, ...], option: str
) -> None:
    with pytest.raises(SpecError) as caught:
        run(*words)
    assert [problem.field for problem in caught.value.problems] == [option]


def test_validate_refuses_an_engine_that_cannot_compile_the_family() -> None:
    unsloth = ["--set", "model.engine=unsloth", "--set", "model.init=pretrained"]
    compiled = ["--set", "train.torch_compile=true"]
    with pytest.raises(SpecError) as caught:
        run("validate", SPEC, *unsloth, *compiled)
    [problem] = caught.value.problems
    assert problem.field == "$.train.torch_compile"
    assert problem.message.startswith("must be false if unsloth trains the family ernie45_vl")
    run("validate", SPEC, *unsloth)
    run("validate", SPEC, *compiled)


CONTROL = "a\x1b]0;x\x07\x9b2J\u202e[red]b[/red][/]"
PLANTED = "hf_plantedHubToken0123456789"


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", CONTROL + PLANTED],
        ["command" + CONTROL],
        ["validate", "--" + CONTROL, "x"],
        ["validate", "specs/latex.yaml", "--set", f"train.optim={PLANTED}{CONTROL}"],
        ["validate", "specs/latex.yaml", "--set", f"train.{CONTROL}=1"],
    ],
    ids=["file", "command", "option", "value", "key"],
)
@pytest.mark.parametrize("screen", [False, True], ids=["piped", "on a terminal"])
def test_what_is_wrong_with_arguments_steers_no_terminal(
    arguments: list[str], screen: bool
) -> None:
    environ = {"HF_TOKEN": PLANTED, "NO_COLOR": "1"}
    done: Shown | Finished
    if screen:
        done = job_on_terminal(*arguments, environ=environ)
        # Those of the command's own are for bold text, and for the cursor.
        said = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", done.text).replace("\r\n", "\n")
    else:
        done = job(*arguments, environ=environ)
        said = done.out + done.err
    assert done.code in (2, 10, 12)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said), said
    assert "planted" not in said


@pytest.mark.parametrize("price", ["inf", "nan"])
def test_a_price_that_is_no_finite_number_is_refused(price: str) -> None:
    done = job("plan", "specs/latex.yaml", "--price-per-hour", price)
    assert done.code == 2
    assert "--price-per-hour" in done.err

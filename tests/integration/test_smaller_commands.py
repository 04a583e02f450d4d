"""Commands of fewer stages beside a finished run, and runs that would lie in another."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from job.cli.verify import verify
from job.errors import SpecError, StorageError
from job.pipeline import runner
from job.pipeline.stages import Stages
from job.spec.load import LoadedSpec, load_spec
from tests.jobs import ROOT, read_json, small_run, sums


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished output, for a test to change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def loaded(output: Path, cache: Path, *more: str) -> LoadedSpec:
    """The spec of the small run, for a run in this process."""
    arguments = small_run(str(output), cache=cache)
    settings = [value for name, value in itertools.pairwise(arguments) if name == "--set"]
    text = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
    return load_spec(text, "specs/latex.yaml", [*settings, f"output.uri={output}", *more])


def files(output: Path) -> dict[str, bytes]:
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and ".lease" not in path.parts
    }


@pytest.mark.parametrize("command", ["prep", "train", "eval", "export"])
def test_a_smaller_command_with_nothing_to_make_leaves_a_finished_run_as_it_is(
    command: str, output: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(output)
    runner.run(loaded(output, cache), command)
    assert files(output) == before
    said = capsys.readouterr().err
    assert "nothing to do; the run at the output is already finished" in said
    assert "withdrawn" not in said


@pytest.mark.slow
def test_a_smaller_command_that_made_something_says_what_is_left_to_make(
    output: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.run(loaded(output, cache, "eval.max_samples=5"), "eval")
    said = capsys.readouterr().err
    assert "_SUCCESS of the finished run is removed until it is finished again" in said
    assert (output / "_SUCCESS").is_file()  # the export is as complete as before
    assert verify(str(output)).files > 10

    capsys.readouterr()
    runner.run(loaded(output, cache, "export.merged.max_shard_size=4GB"), "export")
    said = capsys.readouterr().err
    assert "the run at the output is no longer finished" in said
    assert 'to_be_made="baseline, eval, report"' in said
    assert "the command run, with the same spec and settings, finishes it again" in said
    assert not (output / "_SUCCESS").exists()
    run = read_json(output / "run.json")
    assert (run["command"], run["status"]) == ("export", "succeeded")
    assert set(run["stages"]) == {"prep", "train", "export", "card"}


def test_a_smaller_command_that_makes_the_run_whole_finishes_it(output: Path, cache: Path) -> None:
    before = sums(output)
    (output / "eval" / "final.json").unlink()
    (output / "report.html").unlink()
    runner.run(loaded(output, cache), "eval")
    assert sums(output).keys() == before.keys()
    run = read_json(output / "run.json")
    assert list(run["stages"]) == ["prep", "baseline", "train", "eval", "export", "card", "report"]
    assert json.loads((output / "_SUCCESS").read_text())["sha256sums"]
    verify(str(output))
    again = runner.run(loaded(output, cache))
    assert {event["event"] for event in again.events} == {"skipped"}


def test_no_card_stays_beside_other_weights(
    output: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [output / "adapter" / "README.md", output / "merged" / "README.md"]
    assert all(card.is_file() for card in cards)

    def train(stages: Stages, directory: Path) -> dict[str, object]:
        assert not any(card.exists() for card in cards)
        raise StorageError("here", "is as far as this test goes")

    monkeypatch.setattr(Stages, "train", train)
    with pytest.raises(StorageError, match="as far as this test goes"):
        runner.run(loaded(output, cache, "train.learning_rate=1e-3"), "train")


@pytest.mark.parametrize("nested", ["merged/mine", "deep/er"])
def test_an_output_in_another_run_is_refused(
    nested: str, output: Path, cache: Path, tmp_path: Path
) -> None:
    before = files(output)
    (tmp_path / "link").symlink_to(output)
    for place in (output / nested, tmp_path / "link" / nested):
        with pytest.raises(SpecError, match=f"is inside the output of another run, {output}"):
            runner.run(loaded(place, cache))
    assert files(output) == before


def test_an_output_whose_folder_is_another_run_is_refused(
    output: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "outer").mkdir()
    output.rename(tmp_path / "outer" / "merged")
    with pytest.raises(SpecError, match="its folder merged/, which this run writes, is the output"):
        runner.run(loaded(tmp_path / "outer", cache))
    assert sums(tmp_path / "outer" / "merged")

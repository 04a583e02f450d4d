"""`job verify` finds whatever differs from what a finished run wrote down, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from job import storage
from job.artifacts.output import Output
from job.artifacts.records import RunRecord, read_stage
from job.cli.verify import verify
from job.errors import DataError, InputError, StorageError
from job.train.checkpoint.storage import CheckpointStore
from tests.conftest import S3
from tests.jobs import job

FILES = {
    "prep": {"data/rows.arrow": b"rows" * 1000, "data/stats.json": b"{}"},
    "export": {"merged/model.safetensors": b"weights" * 1000, "merged/config.json": b"{}"},
}


def finished(uri: str, place: Path) -> None:
    """A finished run of two stages and two checkpoints."""
    run = RunRecord(name="r", command="run", status="running", started="now")
    output = Output(uri=uri, workdir=place / "work", run=run)
    output.acquire()
    output.write_sbom("{}")
    output.start_run("version: 1\n")
    for stage, files in FILES.items():
        output.stages.invalidate(stage)
        folder = output.stages.local.create(stage)
        for path, content in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        run.stages[stage] = output.stages.publish(stage, f"of {stage}", "now", 1.0, {})
    writer = output.writer.inside("checkpoints")
    store = CheckpointStore(uri=output.at("checkpoints"), fingerprint="f", writer=writer)
    for step in (2, 4):
        folder = place / f"step-{step}"
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(b"adapter")
        store.save(folder, step)
    output.finish_run(complete=True)
    output.release()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    finished(str(tmp_path / "out"), tmp_path)
    return tmp_path / "out"


def found(run: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        verify(str(run))
    return str(caught.value)


@pytest.mark.parametrize("store", ["local", "s3", "memory"])
def test_a_whole_run_is_whole_in_every_store_and_nothing_is_written(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri = f"memory://{tmp_path}/out" if store == "memory" else str(tmp_path / "out")
    if store == "s3":
        s3: S3 = request.getfixturevalue("s3")
        uri = s3.uri("out")
    finished(uri, tmp_path)
    before = [(entry.path, entry.version) for entry in storage.list_files(uri)]
    whole = verify(uri)
    assert (whole.files, whole.checkpoints) == (4, 2)
    assert whole.bytes == 4000 + 2 + 7000 + 2 + 2 * 7
    assert [(entry.path, entry.version) for entry in storage.list_files(uri)] == before
    storage.write_bytes(f"{uri}/merged/model.safetensors", b"Weights" + b"weights" * 999)
    assert "merged/model.safetensors: has other bytes: its SHA-256 differs" in found(uri)


def remove(path: str) -> Callable[[Path], None]:
    return lambda run: (run / path).unlink()


def put(path: str, text: str) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_text(text)

    return write


def replaced(path: str, old: str, new: str) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        text = (run / path).read_text()
        assert old in text
        (run / path).write_text(text.replace(old, new))

    return write


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (remove("merged/config.json"), "merged/config.json: is missing"),
        (put("merged/config.json", "{ }"), "merged/config.json: has 3 bytes instead of 2"),
        (put("merged/config.json", "[]"), "merged/config.json: has other bytes"),
        (
            put("merged/model-00009-of-00009.safetensors", "x"),
            "merged/model-00009-of-00009.safetensors: is not of this run: no record names it",
        ),
        (
            put("adapter/adapter_model.safetensors", "x"),
            "adapter/adapter_model.safetensors: is not of this run: no record names it",
        ),
        (remove(".stages/prep.json"), ".stages/prep.json: is missing, but run.json says"),
        (put(".stages/prep.json", "{"), ".stages/prep.json: the marker is unreadable"),
        (
            replaced(".stages/prep.json", "of prep", "of another"),
            ".stages/prep.json: is of another execution of the stage than run.json",
        ),
        (put("run.json", "{"), "run.json: is missing or unreadable"),
        (
            replaced("run.json", '"succeeded"', '"preempted"'),
            "run.json: says preempted, but _SUCCESS says that it succeeded",
        ),
        (remove("SHA256SUMS"), "SHA256SUMS: is missing, or names no file"),
        (put("SHA256SUMS", "00  data/stats.json\n"), "SHA256SUMS: is not the one that _SUCCESS"),
        (put("SHA256SUMS", "00  ../../etc/passwd\n"), "leads out of its folder"),
        (remove("checkpoints/step-2/manifest.json"), "checkpoints/step-2: has no manifest"),
        (put("checkpoints/step-2/manifest.json", "[]"), "step-2/manifest.json: is unreadable"),
        (
            remove("checkpoints/step-4/adapter.safetensors"),
            "checkpoints/step-4/adapter.safetensors: is missing",
        ),
        (put("checkpoints/step-4/adapter.safetensors", "Adapter"), "has other bytes"),
        (put("checkpoints/step-4/other.bin", "x"), "other.bin: is not named by the manifest"),
    ],
)
def test_what_differs_is_named(damage: Callable[[Path], None], told: str, run: Path) -> None:
    verify(str(run))
    damage(run)
    assert told in found(run)


def test_every_difference_is_told_at_once(run: Path) -> None:
    shutil.rmtree(run / "merged")
    (run / "data" / "extra").write_text("x")
    said = found(run)
    for path in ("merged/model.safetensors", "merged/config.json", "data/extra"):
        assert f"{run}/{path}: " in said


@pytest.mark.parametrize("marked", [False, True])
def test_what_a_killed_making_left_of_a_stage_that_the_run_has_no_more_is_removed(
    marked: bool, run: Path, tmp_path: Path
) -> None:
    marker, left = run / ".stages" / "baseline.json", ("eval/baseline.json", "data/rows.arrow")
    (run / "eval").mkdir()
    (run / "eval" / "baseline.json").write_text("{}")
    (run / "eval" / "mine.json").write_text("{}")
    (run / ".stages" / "baseline.unfinished.json").write_text(json.dumps({"files": left}))
    if marked:
        marker.write_text((run / ".stages" / "prep.json").read_text())
    record = RunRecord(name="r", command="run", status="running", started="now")
    for stage in FILES:
        record.stages[stage] = read_stage(str(run / ".stages" / f"{stage}.json"))
    (run / "_SUCCESS").unlink()
    output = Output(uri=str(run), workdir=tmp_path / "again", run=record)
    output.acquire()
    output.finish_run(complete=True)
    output.release()
    assert not (run / "eval" / "baseline.json").exists()
    assert (run / "eval" / "mine.json").exists()
    assert not list((run / ".stages").glob("baseline*"))
    (run / "eval" / "mine.json").unlink()
    verify(str(run))


def test_a_marker_that_is_cut_is_one_problem(run: Path) -> None:
    put(".stages/prep.json", "{")(run)
    assert found(run).count(".stages/prep.json: ") == 1


def test_what_lies_beside_the_runs_folders_is_its_owners(run: Path) -> None:
    for path in ("notes.md", "logs/tensorboard/events", "mine/model.safetensors"):
        put(path, "mine")(run) if "/" not in path else (run / path).parent.mkdir(parents=True)
        (run / path).write_text("mine")
    verify(str(run))


def test_a_success_of_an_earlier_version_is_empty_and_does(run: Path) -> None:
    (run / "_SUCCESS").write_text("")
    assert verify(str(run)).files == 4


def test_a_run_that_is_not_finished_is_no_damage(run: Path, tmp_path: Path) -> None:
    (run / "_SUCCESS").unlink()
    for place in (run, tmp_path / "nothing"):
        with pytest.raises(InputError, match="is missing, so the run is not finished"):
            verify(str(place))


def test_a_run_that_changes_meanwhile_is_not_called_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = storage.open_read

    def meanwhile(uri: str) -> object:
        (run / "_SUCCESS").unlink(missing_ok=True)
        return read(uri)

    monkeypatch.setattr(storage, "open_read", meanwhile)
    with pytest.raises(StorageError, match="the run changed while it was verified"):
        verify(str(run))


def test_the_command_ends_with_11_and_names_the_file(run: Path) -> None:
    done = job("verify", str(run))
    assert done.code == 0, done.err
    assert "the run is intact files=4 checkpoints=2" in done.err
    (run / "merged" / "config.json").write_text("[]")
    done = job("verify", str(run))
    assert done.code == 11
    assert f"{run}/merged/config.json: has other bytes: its SHA-256 differs" in done.err
    assert json.loads((run / "_SUCCESS").read_text())["sha256sums"]


@pytest.mark.parametrize(
    "path", ["SHA256SUMS", "run.json", ".stages/prep.json", "checkpoints/step-4/manifest.json"]
)
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000], ids=["no text", "nested"])
def test_a_record_that_is_no_text_or_nested_without_end_is_a_finding(
    path: str, content: bytes, run: Path
) -> None:
    (run / path).unlink()
    (run / path).write_bytes(content)
    assert path in found(run)


def test_digests_that_are_no_text_are_written_again(run: Path, tmp_path: Path) -> None:
    (run / "SHA256SUMS").unlink()
    (run / "SHA256SUMS").write_bytes(b"\xff\xfe")
    record = RunRecord(name="r", command="run", status="running", started="now")
    output = Output(uri=str(run), workdir=tmp_path / "again", run=record)
    output.acquire()
    record.stages.update({stage: read_stage(f"{run}/.stages/{stage}.json") for stage in FILES})
    output.write_sbom("{}")
    output.start_run("version: 1\n")
    output.finish_run(complete=True)
    output.release()
    verify(str(run))

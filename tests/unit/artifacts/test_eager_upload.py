"""Files that go up before their stage is done: what readers see, and what becomes of them."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from job import storage
from job.artifacts.output import Output
from job.artifacts.records import RunRecord
from job.errors import StorageError

SHARDS = [f"merged/model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
REST = ["merged/config.json", "merged/model.safetensors.index.json"]


def output_at(place: Path) -> Output:
    run = RunRecord(name="r", command="run", status="running", started="now")
    output = Output(uri=str(place / "out"), workdir=place / "work", run=run)
    output.acquire()
    return output


def kill(output: Output) -> None:
    """As if its job had been killed: it neither tidies up nor gives its lease up."""
    for lease in Path(output.uri, ".lease").glob("*.json"):
        lease.unlink()


def at(output: Output) -> dict[str, str]:
    """What a reader finds in `merged/`."""
    found = Path(output.uri, "merged")
    return {f"merged/{path.name}": path.read_text() for path in sorted(found.glob("[!.]*"))}


def arrive(output: Output, paths: list[str]) -> None:
    """Waits until the files are at the output."""
    deadline = time.monotonic() + 10
    while not at(output).keys() >= set(paths):
        assert time.monotonic() < deadline, at(output)
        time.sleep(0.01)


def make(output: Output, paths: list[str], text: str) -> Path:
    """Begins an export and writes the files; shards are sent as they are written."""
    output.stages.invalidate("export")
    directory = output.stages.local.create("export")
    (directory / "merged").mkdir()
    for path in paths:
        (directory / path).write_text(f"{path} {text}")
        if path in SHARDS:
            output.stages.upload_eagerly("export", directory / path)
    return directory


def publish(output: Output, fingerprint: str = "f") -> None:
    output.stages.publish("export", fingerprint, "now", 1.0, {})


def test_shards_are_there_before_the_rest_and_the_marker(tmp_path: Path) -> None:
    output = output_at(tmp_path)
    make(output, SHARDS + REST, "one")
    arrive(output, SHARDS)
    assert list(at(output)) == SHARDS
    assert not output.stages.markers.exists("export")
    publish(output)
    assert list(at(output)) == sorted(SHARDS + REST)
    assert output.stages.completed("export", "f") is not None


def test_what_went_up_is_not_uploaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = list[str]()
    upload = storage.files.upload

    def noting(path: Path, uri: str, *guard: Any, **more: Any) -> None:
        uploaded.append(uri.removeprefix(f"{output.uri}/"))
        upload(path, uri, *guard, **more)

    monkeypatch.setattr(storage, "upload", noting)
    monkeypatch.setattr(storage.trees, "upload", noting)
    output = output_at(tmp_path)
    make(output, SHARDS + REST, "one")
    publish(output)
    assert sorted(uploaded) == sorted(SHARDS + REST)


def test_a_shard_that_changed_after_it_went_up_is_refused(tmp_path: Path) -> None:
    output = output_at(tmp_path)
    directory = make(output, SHARDS + REST, "one")
    arrive(output, SHARDS)
    (directory / SHARDS[1]).write_text("other")
    with pytest.raises(StorageError, match=r"00002-of-00003.*changed after it was"):
        publish(output)
    assert not output.stages.markers.exists("export")
    output.stages.roll_back(urgent=False)
    assert not at(output)


def test_nobody_reads_of_two_exports(tmp_path: Path) -> None:
    output = output_at(tmp_path)
    make(output, SHARDS + REST, "one")
    publish(output)
    (tmp_path / "out" / "merged" / "model.gguf").write_text("somebody's own")
    directory = make(output, [], "two")
    assert list(at(output)) == sorted([*SHARDS, *REST, "merged/model.gguf"])
    (directory / SHARDS[0]).write_text("two")
    output.stages.upload_eagerly("export", directory / SHARDS[0])
    arrive(output, SHARDS[:1])
    assert at(output) == {"merged/model.gguf": "somebody's own", SHARDS[0]: "two"}


@pytest.mark.parametrize("now", [SHARDS, ["merged/model.safetensors"]])
def test_what_a_killed_job_left_is_removed_by_the_next(now: list[str], tmp_path: Path) -> None:
    killed = output_at(tmp_path)
    others = ["merged/model-00001-of-00007.safetensors", SHARDS[0]]
    directory = make(killed, [], "killed")
    for path in others:
        (directory / path).write_text("killed")
        killed.stages.upload_eagerly("export", directory / path)
    arrive(killed, others)
    kill(killed)
    output = output_at(tmp_path)
    make(output, now + REST[:1], "two")
    publish(output)
    assert at(output) == {path: f"{path} two" for path in sorted(now + REST[:1])}
    assert not list(Path(output.uri, ".stages").glob("*.unfinished.json"))


def test_files_that_no_record_names_stay_whatever_they_are_called(tmp_path: Path) -> None:
    output = output_at(tmp_path)
    own = {"merged/config.json": "mine", "merged/sub/model.safetensors": "mine"}
    for path, text in own.items():
        storage.write_text(output.at(path), text)
    for text in ("one", "two"):
        make(output, SHARDS + REST[1:], text)
        publish(output)
    for path, text in own.items():
        assert storage.read_text(output.at(path)) == text


def test_an_export_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    output = output_at(tmp_path)
    make(output, SHARDS, "one")
    output.stages.roll_back(urgent=False)
    assert not at(output)
    make(output, SHARDS, "another thread goes on")
    assert not at(output)
    output.release()
    next_run = output_at(tmp_path)
    make(next_run, SHARDS + REST, "again")
    publish(next_run)
    assert list(at(next_run)) == sorted(SHARDS + REST)


def test_an_upload_that_fails_is_raised_at_the_next_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()

    def refuse(path: Path, uri: str, **_: Any) -> None:
        tried.set()
        raise StorageError(uri, "cannot write")

    monkeypatch.setattr(storage, "upload", refuse)
    output = output_at(tmp_path)
    directory = make(output, SHARDS[:1], "one")
    assert tried.wait(10)
    (directory / SHARDS[1]).write_text("two")

    def go_on() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:  # the failure is on its way
            output.stages.upload_eagerly("export", directory / SHARDS[1])
            time.sleep(0.01)

    with pytest.raises(StorageError, match=r"00001-of-00003.*cannot write"):
        go_on()


def test_a_job_that_lost_its_output_sends_nothing(tmp_path: Path) -> None:
    output = output_at(tmp_path)
    storage.write_text(output.at(REST[0]), "another job's")
    storage.write_text(output.at(".lease/9.json"), "{}")
    with pytest.raises(StorageError, match="taken over the output"):
        make(output, SHARDS, "one")
    assert at(output) == {REST[0]: "another job's"}


def test_an_upload_under_way_ends_with_the_stage_and_comes_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = threading.Event(), threading.Event()
    upload = storage.files.upload

    def slow(path: Path, uri: str, **more: Any) -> None:
        begun.set()
        assert gate.wait(10)
        upload(path, uri, **more)

    monkeypatch.setattr(storage, "upload", slow)
    output = output_at(tmp_path)
    make(output, SHARDS, "one")
    assert begun.wait(10)
    threading.Timer(0.2, gate.set).start()
    output.stages.roll_back(urgent=False)
    assert not at(output)

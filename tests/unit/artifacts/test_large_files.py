"""Large files of a stage: on local disks once, and read once for their digest."""

import errno
import os
from pathlib import Path

import pytest

from job.artifacts.output import Output
from job.artifacts.records import RunRecord
from job.errors import StorageError
from job.storage import digests, files, local

NAMES = [f"merged/model-{number:05}-of-00002.safetensors" for number in (1, 2)]
SMALL = "merged/config.json"


@pytest.fixture
def output(tmp_path: Path) -> Output:
    run = RunRecord(name="r", command="run", status="running", started="now")
    output = Output(uri=str(tmp_path / "out"), workdir=tmp_path / "work", run=run)
    output.acquire()
    return output


def export(output: Output, text: bytes = b"x") -> Path:
    """Writes an export of two large shards, which are uploaded as they are written."""
    output.stages.invalidate("export")
    directory = output.stages.local.create("export")
    (directory / "merged").mkdir()
    for name in NAMES:
        (directory / name).write_bytes(text * files.LINKED_FROM)
        os.utime(directory / name, (0, 0))  # long ago, as for a file that takes seconds to hash
        output.stages.upload_eagerly("export", directory / name)
    (directory / SMALL).write_text("{}")
    return directory


def test_a_local_output_gets_large_files_without_a_copy(output: Output) -> None:
    directory = export(output)
    output.stages.publish("export", "f", "now", 1.0, {})
    assert output.stages.completed("export", "f") is not None
    for name in NAMES:
        assert (directory / name).samefile(Path(output.uri, name))
    assert not (directory / SMALL).samefile(Path(output.uri, SMALL))
    assert not list(Path(output.uri).rglob(".writing-*"))
    output.stages.local.create("export")  # what the next run of the stage does first
    assert Path(output.uri, NAMES[0]).read_bytes() == b"x" * files.LINKED_FROM


def test_a_stage_that_runs_again_replaces_its_links(output: Output) -> None:
    export(output)
    output.stages.publish("export", "f", "now", 1.0, {})
    before = os.open(Path(output.uri, NAMES[0]), os.O_RDONLY)  # a reader has it open
    export(output, b"y")
    output.stages.publish("export", "g", "now", 1.0, {})
    assert Path(output.uri, NAMES[0]).read_bytes() == b"y" * files.LINKED_FROM
    assert os.pread(before, 1, 0) == b"x"
    os.close(before)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_where_no_link_can_be_made_the_file_is_copied(
    code: int, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local.os, "link", refuse)
    directory = export(output)
    output.stages.publish("export", "f", "now", 1.0, {})
    for name in NAMES:
        assert not (directory / name).samefile(Path(output.uri, name))
        assert (directory / name).read_bytes() == Path(output.uri, name).read_bytes()


def test_a_file_of_a_stage_is_hashed_once(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, sha256_file = list[str](), digests.sha256_file

    def noting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(digests, "sha256_file", noting)
    directory = export(output)
    first = output.stages.digests.tree(directory / "merged")  # for the proof
    record = output.stages.publish("export", "f", "now", 1.0, {})
    assert [file.sha256 for file in record.files] == [file.sha256 for file in first]
    for name in NAMES:
        assert hashed.count(Path(name).name) == 1


def test_a_change_after_the_first_look_is_not_missed(output: Output) -> None:
    directory = export(output)
    known = output.stages.digests.sha256(directory / NAMES[0])
    with (directory / NAMES[0]).open("r+b") as file:
        file.write(b"?")
    assert output.stages.digests.sha256(directory / NAMES[0]) != known
    with pytest.raises(StorageError, match="changed after it was uploaded"):
        output.stages.publish("export", "f", "now", 1.0, {})


def test_a_file_that_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    known, path = digests.TreeDigests(), tmp_path / "a"
    with pytest.raises(FileNotFoundError):
        known.sha256(path)
    path.write_text("a")
    assert known.sha256(path) == digests.sha256_file(path)

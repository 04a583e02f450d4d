"""A local file is hashed once, and again as soon as anything about it has changed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from job.local import file_digests
from job.local.file_digests import REMEMBERED, FileDigests


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(1 << 16) * 257)  # just above 16 MiB
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order."""
    paths: list[Path] = []
    whole = file_digests.sha256_file

    def sha256_file(path: Path) -> str:
        paths.append(path)
        return whole(path)

    monkeypatch.setattr(file_digests, "sha256_file", sha256_file)
    return paths


def settle(cache: Path) -> None:
    """As if the files had been hashed a while after they were written."""
    records = json.loads((cache / REMEMBERED).read_text())
    for record in records.values():
        record["looked_ns"] += 60 * 10**9
    (cache / REMEMBERED).write_text(json.dumps(records))


def test_a_file_that_did_not_change_is_not_read_by_a_later_run(
    weights: Path, tmp_path: Path, hashed: list[Path]
) -> None:
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert FileDigests(tmp_path / "cache").sha256([weights]) == [expected]
    settle(tmp_path / "cache")
    assert FileDigests(tmp_path / "cache").sha256([weights]) == [expected]
    assert hashed == [weights]


@pytest.mark.parametrize("how", ["changed", "changed with its time", "replaced", "cut"])
def test_a_file_that_changed_is_read_again(how: str, weights: Path, tmp_path: Path) -> None:
    FileDigests(tmp_path / "cache").sha256([weights])
    settle(tmp_path / "cache")
    stat, content = weights.stat(), weights.read_bytes()
    content = content[:-1] if how == "cut" else content[::-1]
    if how == "replaced":
        weights.unlink()
    weights.write_bytes(content)
    if how != "changed":
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = FileDigests(tmp_path / "cache").sha256([weights])
    assert found == [hashlib.sha256(content).hexdigest()]


def test_a_record_made_right_after_a_change_is_not_trusted(
    weights: Path, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "SETTLED_NS", 600 * 10**9)  # however slow the machine is
    for _ in range(2):
        FileDigests(tmp_path / "cache").sha256([weights])
    assert hashed == [weights, weights]


def test_a_thread_waits_for_another_that_hashes_the_same_file(
    weights: Path, tmp_path: Path, hashed: list[Path]
) -> None:
    os.utime(weights, ns=(0, 0))
    digests, found = FileDigests(), list[list[str]]()
    threads = [
        threading.Thread(target=lambda: found.append(digests.sha256([weights]))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[hashlib.sha256(weights.read_bytes()).hexdigest()]] * 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"/a": {}}', '{"/a": 1}'])
def test_damaged_memory_costs_time_only(content: str, weights: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / REMEMBERED).write_text(content)
    expected = [hashlib.sha256(weights.read_bytes()).hexdigest()]
    assert FileDigests(cache).sha256([weights]) == expected
    assert list(json.loads((cache / REMEMBERED).read_text())) == [str(weights)]


def test_a_cache_that_cannot_be_written_costs_time_only(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    expected = [hashlib.sha256(weights.read_bytes()).hexdigest()]
    assert FileDigests(tmp_path / "cache").sha256([weights]) == expected


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileDigests().sha256([tmp_path / "missing"])


def test_a_small_file_does_not_wait_for_a_large_one_that_another_thread_hashes(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"{}\n")
    digests, begun, small_is_done = FileDigests(), threading.Event(), threading.Event()
    whole = file_digests.sha256_file

    def sha256_file(path: Path) -> str:
        if path == weights:
            begun.set()
            assert small_is_done.wait(60)
        return whole(path)

    monkeypatch.setattr(file_digests, "sha256_file", sha256_file)
    found = list[list[str]]()
    thread = threading.Thread(target=lambda: found.append(digests.sha256([weights])))
    thread.start()
    assert begun.wait(60)
    assert digests.sha256([rows]) == [hashlib.sha256(b"{}\n").hexdigest()]
    small_is_done.set()
    thread.join()
    assert found == [[hashlib.sha256(weights.read_bytes()).hexdigest()]]


def test_a_job_that_ends_does_not_wait_for_files_that_are_being_hashed(tmp_path: Path) -> None:
    endless = tmp_path / "model.safetensors"
    os.mkfifo(endless)  # as a disk that takes minutes: nobody ever writes to it
    code = f"""
import threading, time
from pathlib import Path
from job.local.file_digests import FileDigests
hash = lambda: FileDigests().sha256([Path({str(endless)!r})])
threading.Thread(target=hash, daemon=True).start()
while not any(each.name == "digests" for each in threading.enumerate()):
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

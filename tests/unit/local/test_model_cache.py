"""A cached file is believed by its digest, whoever changed it, and removed only when unused."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job import storage
from job.errors import InputError
from job.families import model_source
from job.local import cache, eviction
from job.local.cache import ExpectedFile
from job.storage.digests import sha256_file
from tests.jobs import ROOT

FILES = {"config.json": b"{}", "model-1.safetensors": b"weights" * 100, "tokenizer.json": b"[]"}


@pytest.fixture
def model(tmp_path: Path) -> model_source.ModelInput:
    uri = f"memory://cache{tmp_path}"
    for name, content in FILES.items():
        storage.write_bytes(storage.join(uri, name), content)
    return model_source.ModelInput(uri=uri, files=storage.list_files(uri))


def settle(entry: Path) -> None:
    """As if the files had been looked at a while after they were written."""
    record = json.loads((entry / eviction.COMPLETE).read_text())
    for known in record["files"].values():
        known["looked_ns"] += 60 * 10**9
    (entry / eviction.COMPLETE).write_text(json.dumps(record))


@pytest.mark.parametrize("how", ["cut", "changed", "changed with its time", "gone", "replaced"])
def test_a_cached_shard_that_is_not_as_it_was_stored_is_fetched_anew(
    how: str, model: model_source.ModelInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = model_source.fetch_model(model, tmp_path) / "model-1.safetensors"
    settle(shard.parent)
    stat, whole = shard.stat(), shard.read_bytes()
    if how == "cut":
        shard.write_bytes(whole[:-1])
    elif how == "gone":
        shard.unlink()
    elif how == "replaced":
        shard.unlink()
        shard.write_bytes(whole[::-1])
    else:
        shard.write_bytes(whole[::-1])
    if how in ("changed with its time", "replaced") and shard.exists():
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert model_source.fetch_model(model, tmp_path) == shard.parent
    assert shard.read_bytes() == whole
    assert "is missing or damaged; downloading it again" in capsys.readouterr().err


def test_what_changed_in_the_moment_it_was_stored_is_noticed(
    model: model_source.ModelInput, tmp_path: Path
) -> None:
    shard = model_source.fetch_model(model, tmp_path) / "model-1.safetensors"
    whole = shard.read_bytes()
    record = json.loads((shard.parent / eviction.COMPLETE).read_text())
    shard.write_bytes(whole[::-1])
    # A clock that ticks slowly gives both the same times.
    known, stat = record["files"][shard.name], shard.stat()
    known["modified_ns"], known["changed_ns"] = stat.st_mtime_ns, stat.st_ctime_ns
    known["looked_ns"] = stat.st_ctime_ns
    (shard.parent / eviction.COMPLETE).write_text(json.dumps(record))
    model_source.fetch_model(model, tmp_path)
    assert shard.read_bytes() == whole


def test_unchanged_files_are_not_read_again(
    model: model_source.ModelInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(model_source.fetch_model(model, tmp_path))
    read = list[Path]()

    def seen(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(cache, "sha256_file", seen)
    entry = model_source.fetch_model(model, tmp_path)
    assert not read
    os.utime(entry / "config.json")
    model_source.fetch_model(model, tmp_path)
    assert read == [entry / "config.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {"config.json": {}}}'])
def test_an_entry_whose_record_is_unreadable_is_fetched_anew(
    text: str, model: model_source.ModelInput, tmp_path: Path
) -> None:
    entry = model_source.fetch_model(model, tmp_path)
    (entry / eviction.COMPLETE).write_text(text)
    (entry / "model-1.safetensors").write_bytes(b"other!!" * 100)
    model_source.fetch_model(model, tmp_path)
    assert {name: (entry / name).read_bytes() for name in FILES} == FILES


def test_an_entry_is_not_there_before_it_is_whole_and_goes_on_where_it_broke_off(
    tmp_path: Path,
) -> None:
    wanted = [ExpectedFile(path=name, size=len(content)) for name, content in FILES.items()]
    brought = list[str]()

    def fetch(file: ExpectedFile, path: Path) -> None:
        assert not (tmp_path / "models" / "key").exists()
        if file.path == "tokenizer.json" and brought.count(file.path) == 0:
            brought.append(file.path)
            raise InputError("store", "is away")
        brought.append(file.path)
        path.write_bytes(FILES[file.path])

    with pytest.raises(InputError, match="is away"):
        cache.ensure(tmp_path, "models", "key", wanted, fetch, source="x://y", limit=0)
    entry = cache.ensure(tmp_path, "models", "key", wanted, fetch, source="x://y", limit=0)
    assert {name: (entry / name).read_bytes() for name in FILES} == FILES
    assert sorted(brought) == ["config.json", "model-1.safetensors", *["tokenizer.json"] * 2]
    assert [path.name for path in entry.parent.iterdir() if path.is_dir()] == ["key"]


BRING = """
import os, sys, time
from pathlib import Path
from job.local import cache
wanted = [cache.ExpectedFile(path=f"{n}.bin", size=2**20) for n in range(8)]
def fetch(file, path):
    with open(sys.argv[2], "a") as log:
        log.write(f"{file.path}\\n")
    time.sleep(0.05)
    path.write_bytes(bytes(2**20))
entry = cache.ensure(Path(sys.argv[1]), "models", "key", wanted, fetch, source="x://y", limit=0)
print(all((entry / f.path).stat().st_size == 2**20 for f in wanted), flush=True)
if len(sys.argv) > 3:
    time.sleep(60)
"""


def bringing(place: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BRING, str(place / "cache"), str(place / "brought"), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_jobs_that_need_one_model_at_once_download_it_once(tmp_path: Path) -> None:
    processes = [bringing(tmp_path) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out == "True\n", err
    assert sorted((tmp_path / "brought").read_text().split()) == [f"{n}.bin" for n in range(8)]


def entry(cache_dir: Path, key: str, used: float, count: int = 1000) -> Path:
    def fetch(file: ExpectedFile, path: Path) -> None:
        path.write_bytes(bytes(file.size))

    wanted = [ExpectedFile(path="weights", size=count)]
    made = cache.ensure(cache_dir, "models", key, wanted, fetch, source="x://y", limit=0)
    cache._in_use.pop(made).close()  # as if the process that made it had ended
    for stamp in (eviction.USED, eviction.COMPLETE):
        os.utime(made / stamp, (used, used))
    return made


def test_the_entries_that_were_not_used_for_longest_go_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [entry(tmp_path, f"{n}", used=1000 + n) for n in range(4)]
    total = sum(each.bytes for each in eviction.entries(tmp_path))
    eviction.make_room(tmp_path, total + 100, 1500)
    assert [each.exists() for each in made] == [False, False, True, True]
    assert f"removed from the cache entry={made[0]}" in capsys.readouterr().err


def test_an_entry_in_use_stays_however_old_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = bringing(tmp_path, "stay")
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "True\n"
        used = tmp_path / "cache" / "models" / "key"
        for stamp in (eviction.USED, eviction.COMPLETE):
            os.utime(used / stamp, (1, 1))
        other = entry(tmp_path / "cache", "other", used=time.time())
        eviction.make_room(tmp_path / "cache", 1)
        assert used.exists()
        assert not other.exists()
        assert "larger than runtime.cache_limit" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    eviction.make_room(tmp_path / "cache", 1)
    assert not used.exists()


def test_a_download_makes_its_room_before_it_begins(tmp_path: Path) -> None:
    old = entry(tmp_path, "old", used=1000)
    seen = list[bool]()

    def fetch(file: ExpectedFile, path: Path) -> None:
        seen.append(old.exists())
        path.write_bytes(bytes(file.size))

    wanted = [ExpectedFile(path="weights", size=5000)]
    cache.ensure(tmp_path, "models", "new", wanted, fetch, source="x://y", limit=6000)
    assert seen == [False]


@pytest.mark.parametrize(
    ("text", "count"), [(None, 0), ("200GB", 200 * 10**9), ("1.5KB", 1500), ("2TB", 2 * 10**12)]
)
def test_a_limit_is_read_as_the_spec_writes_it(text: str | None, count: int) -> None:
    assert eviction.parse_size(text) == count


def test_a_cache_that_cannot_be_made_is_named_by_its_key(
    model: model_source.ModelInput, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"\$\.runtime\.cache_dir: is not writable") as raised:
        model_source.fetch_model(model, tmp_path / "file" / "cache")
    assert raised.value.exit_code == 12


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which can be made read-only even for root."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_cache_serves_what_it_has_and_names_its_key_for_what_it_lacks(
    model: model_source.ModelInput, disk: Path
) -> None:
    whole = model_source.fetch_model(model, disk)
    cache._in_use.pop(whole).close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert model_source.fetch_model(model, disk) == whole
    storage.write_bytes(storage.join(model.uri, "vocab.json"), b"{}")
    more = model_source.ModelInput(uri=model.uri, files=storage.list_files(model.uri))
    with pytest.raises(InputError, match=r"\$\.runtime\.cache_dir: is not writable"):
        model_source.fetch_model(more, disk)

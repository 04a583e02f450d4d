"""Rows that were prepared once serve every output on the machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from job.errors import InputError
from job.pipeline import runner
from job.prep import cache
from job.spec.load import load_spec
from job.storage.digests import digest_tree
from tests.jobs import ROOT
from tests.unit.prep.test_prep import pair, png, write_jsonl

SPEC = """
version: 1
name: test
model: {{model_name_or_path: "builtin://ernie-vl-tiny", init: random}}
data: {{train: {{uri: "{rows}"}}, eval_fraction: 0.3, instruction: Read it.}}
output: {{uri: "{place}/{output}"}}
runtime: {{cache_dir: "{place}/cache"}}
"""
AGAIN = "rows found in the cache"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    for n in range(20):
        (tmp_path / "data" / "images" / f"{n}.png").write_bytes(png(40 + n))
    return write_jsonl(tmp_path / "data", [pair(n) for n in range(20)])


def prep(rows: Path, place: Path, output: str) -> dict[str, int]:
    text = SPEC.format(rows=rows, place=place, output=output)
    return runner.run(load_spec(text, "spec", environ={}), "prep").rows


def test_another_output_gets_the_same_bytes_without_preparing_again(
    rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = prep(rows, tmp_path, "a")
    assert AGAIN not in capfd.readouterr().err
    assert prep(rows, tmp_path, "b") == first
    told = capfd.readouterr().err
    assert AGAIN in told
    assert "prep train" not in told
    assert digest_tree(tmp_path / "a" / "data") == digest_tree(tmp_path / "b" / "data")


def test_keeping_rows_takes_no_room_beside_the_run_that_made_them(
    rows: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "train-00000.arrow").write_bytes(b"rows")
    cache.store(tmp_path / "cache", "x", made, {})
    [kept] = (tmp_path / "cache").rglob("*.arrow")
    assert kept.samefile(made / kept.name)
    prep(rows, tmp_path, "a")
    assert not list((tmp_path / "cache" / "work").iterdir())  # which is removed after success


def test_a_changed_row_or_image_is_prepared_again(
    rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prep(rows, tmp_path, "a")
    (rows.parent / "images" / "3.png").write_bytes(png(43, color="black"))
    prep(rows, tmp_path, "b")
    write_jsonl(rows.parent, [pair(n) for n in range(19)])
    prep(rows, tmp_path, "c")
    assert AGAIN not in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "gone", "mark cut", "unmarked"])
def test_what_is_no_longer_as_it_was_made_is_not_used(
    damage: str, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = prep(rows, tmp_path, "a")
    [shard] = (tmp_path / "cache" / "prepared").rglob("train-*.arrow")
    whole = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(whole[:-100])
    elif damage != "gone":
        shard.write_bytes(whole)
        mark = shard.parents[1] / "made.json"
        mark.write_text(mark.read_text()[:-9]) if damage == "mark cut" else mark.unlink()
    assert prep(rows, tmp_path, "b") == first
    assert AGAIN not in capfd.readouterr().err
    assert digest_tree(tmp_path / "a" / "data") == digest_tree(tmp_path / "b" / "data")


def test_the_sets_used_last_are_kept(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "train-00000.arrow").write_bytes(b"rows")
    kept = tmp_path / "cache"
    for number in range(cache.MAX_ENTRIES):
        cache.store(kept, f"{number}", made, {"train": number})
        os.utime(kept / f"{number}" / "made.json", (number, number))
    assert cache.restore(kept, "0", tmp_path / "out") == {"train": 0}
    cache.store(kept, "new", made, {"train": 9})
    assert {path.name for path in kept.iterdir()} == {"0", "2", "3", "new"}


KEEP_AND_TAKE = """
import shutil, sys
from contextlib import suppress
from pathlib import Path
from job.prep import cache
place, seed, tries = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
made, out = place / f"made-{seed}", place / f"out-{seed}"
made.mkdir()
names = [f"train-{n:05d}.arrow" for n in range(12)]
for name in names:
    (made / name).write_bytes(name.encode() * 50)
taken = torn = 0
for n in range(tries):
    cache.store(place / "cache", f"set-{n % 3}", made, {"train": 12})
    if cache.restore(place / "cache", f"set-{n % 3}", out) is not None:
        taken += 1
        torn += sorted(path.name for path in out.iterdir()) != names
    shutil.rmtree(out, ignore_errors=True)
    if n % 5 == 0:
        for kept in (place / "cache").glob("[!.]*"):
            with suppress(OSError):  # another removes it too
                cache.discard(kept)
            break
print(taken, torn)
"""


def test_an_entry_that_is_taken_is_whole_however_many_jobs_keep_the_same_rows_at_once(
    tmp_path: Path,
) -> None:
    tries = 150
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KEEP_AND_TAKE, str(tmp_path), f"{n}", f"{tries}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        taken, torn = map(int, out.split())
        assert torn == 0
        assert taken > tries / 2
    assert not list((tmp_path / "cache").glob(".partial-*"))


def test_an_entry_that_cannot_be_linked_to_this_disk_stays_for_other_runs(tmp_path: Path) -> None:
    other = Path("/dev/shm")  # another file system
    if other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here")
    made, place = tmp_path / "made", other / f"prepared-{os.getpid()}"
    made.mkdir()
    (made / "train-00000.arrow").write_bytes(b"rows")
    cache.store(tmp_path / "cache", "x", made, {"train": 1})
    try:
        assert cache.restore(tmp_path / "cache", "x", place) is None
        assert not place.exists()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    assert cache.restore(tmp_path / "cache", "x", tmp_path / "out") == {"train": 1}


def test_a_cache_that_may_not_be_written_costs_the_cache_alone(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # where no folder can be made, not even by root
    text = SPEC.format(rows=rows, place=tmp_path, output="a")
    more = [f"runtime.workdir={tmp_path}/work"]
    done = runner.run(load_spec(text, "spec", more, environ={}), "prep")
    assert done.status == "succeeded"
    with pytest.raises(InputError, match=r"\$\.runtime\.cache_dir: is not writable"):
        prep(rows, tmp_path, "b")


def test_without_hard_links_nothing_is_kept_and_nothing_fails(tmp_path: Path) -> None:
    made, other = tmp_path / "made", Path("/dev/shm")  # another file system
    made.mkdir()
    (made / "train-00000.arrow").write_bytes(b"rows")
    if other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system here")
    place = other / f"prepared-{os.getpid()}"
    try:
        cache.store(place, "x", made, {})
        assert not place.exists() or not list(place.iterdir())
        assert cache.restore(place, "x", tmp_path / "out") is None
    finally:
        shutil.rmtree(place, ignore_errors=True)

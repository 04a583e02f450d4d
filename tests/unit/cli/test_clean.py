"""`job clean` removes what was left behind, and nothing that is in use or not the job's."""

import os
import time
from pathlib import Path

import pytest

from job.cli.clean import clean
from job.local import eviction
from tests.jobs import job
from tests.unit.local.test_model_cache import bringing, entry
from tests.unit.local.test_work_folder import folder, holding

LONG_AGO = time.time() - 90 * 86400


def cleaned(cache: Path, *, days: float = 30, remove: bool = True) -> None:
    clean(None, cache, unused_days=days, remove=remove)


def test_it_lists_sizes_ages_and_states_and_removes_nothing_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with folder(tmp_path / "work", f"{tmp_path}/out") as own:
        (own.path / "merged").write_bytes(bytes(3 * 2**20))
    made = entry(tmp_path, "old", used=LONG_AGO, count=2**20)
    cleaned(tmp_path, remove=False)
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first.split()[:3] == ["left", "3.0", "MiB"]
    assert f"{tmp_path}/out" in first
    assert second.split()[:5] == ["unused", "1.0", "MiB", "90", "days"]
    assert "would be removed folders=2" in said.err
    assert "--remove" in said.err
    assert made.exists()
    assert list((tmp_path / "work").iterdir())


def test_what_a_killed_run_left_goes_and_what_a_living_one_holds_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, held = holding(tmp_path / "work", f"{tmp_path}/out")
    try:
        cleaned(tmp_path, days=0)
        assert (held / "made").exists()
        assert capsys.readouterr().out.startswith("in use ")
    finally:
        process.kill()
        process.wait()
    cleaned(tmp_path)
    assert not held.exists()


def test_models_go_when_unused_for_long_and_never_while_a_process_uses_them(
    tmp_path: Path,
) -> None:
    process = bringing(tmp_path, "stay")
    assert process.stdout is not None
    cache = tmp_path / "cache"
    try:
        assert process.stdout.readline() == "True\n"
        used = cache / "models" / "key"
        for stamp in (eviction.USED, eviction.COMPLETE):
            os.utime(used / stamp, (LONG_AGO, LONG_AGO))
        old, new = entry(cache, "old", LONG_AGO), entry(cache, "new", time.time())
        cleaned(cache)
        assert (used.exists(), old.exists(), new.exists()) == (True, False, True)
    finally:
        process.kill()
        process.wait()
    cleaned(cache)
    assert not used.exists()
    assert {path.name for path in (cache / "models").iterdir() if path.is_dir()} == {"new"}


def test_interrupted_downloads_and_removals_go(tmp_path: Path) -> None:
    for each in ("models/.partial-a", "results/.trash-b", "work/.trash-c"):
        (tmp_path / each).mkdir(parents=True)
        (tmp_path / each / "weights").write_bytes(b"half")
    cleaned(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name == "weights"]


def test_rows_that_a_run_may_be_linking_stay(tmp_path: Path) -> None:
    young, old = (tmp_path / "prepared" / f".partial-{n}" for n in "ab")
    for each in (young, old):
        each.mkdir(parents=True)
    os.utime(old, (LONG_AGO, LONG_AGO))
    cleaned(tmp_path)
    assert (young.exists(), old.exists()) == (True, False)


def test_folders_of_versions_without_a_note_go_when_they_did_not_change_for_a_day(
    tmp_path: Path,
) -> None:
    old, young = tmp_path / "work" / "latex-01234567", tmp_path / "work" / "latex-89abcdef"
    for each in (old, young):
        (each / "stages" / "export").mkdir(parents=True)
    for each in (old / "stages" / "export", old / "stages", old):
        os.utime(each, (LONG_AGO, LONG_AGO))
    cleaned(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_what_is_not_the_jobs_is_neither_listed_nor_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "work" / "photos-01234567"
    (mine / "2019").mkdir(parents=True)
    (tmp_path / "work" / "notes.txt").write_text("mine")
    names = ("ernie", ".git", "mine.partial")
    kept = [tmp_path / kind / name for kind in eviction.KINDS for name in names]
    for each in kept:
        each.mkdir(parents=True)
        (each / "model.safetensors").write_text("mine")
        os.utime(each, (LONG_AGO, LONG_AGO))
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "stages").mkdir(parents=True)
    (tmp_path / "models" / "link").symlink_to(elsewhere)
    (tmp_path / "work" / "latex-01234567").symlink_to(elsewhere)
    for each in (mine / "2019", mine, elsewhere / "stages", elsewhere):
        os.utime(each, (LONG_AGO, LONG_AGO))
    cleaned(tmp_path, days=0)
    assert capsys.readouterr().out == ""
    assert (mine / "2019").exists()
    assert (elsewhere / "stages").exists()
    eviction.make_room(tmp_path, limit=1)
    assert all((each / "model.safetensors").exists() for each in kept)
    assert (tmp_path / "work" / "notes.txt").exists()


def test_a_cache_over_its_limit_gives_up_what_was_not_used_for_longest(tmp_path: Path) -> None:
    from job.local import leftovers

    made = [entry(tmp_path, f"{n}", time.time() - 1000 + n) for n in range(3)]
    total = sum(each.bytes for each in eviction.entries(tmp_path))
    found = leftovers.scan(tmp_path, tmp_path / "work", unused_days=30, limit=total - 1)
    assert [each.path for each in found if each.removable] == [made[0]]


def test_settings_without_a_spec_are_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    made = entry(tmp_path / ".cache/finetune-job", "old", used=LONG_AGO)
    found = job(
        *("clean", "--remove", "--set", f"runtime.cache_dir={tmp_path}/other"),
        environ={"HOME": str(tmp_path)},
    )
    assert found.code == 2
    assert "--set: overrides a spec, but no spec is given" in found.err
    assert made.exists()

"""A work folder belongs to one run: it is named by what the output is, and held by a lock."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job import storage
from job.errors import InputError
from job.local.lock import LockHolder
from job.local.work_folder import LOCK_FILE, SILENT_SECONDS, WorkFolder
from tests.jobs import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from job.local.work_folder import WorkFolder
folder = WorkFolder(Path(sys.argv[1]), "job", sys.argv[2], field="$.runtime.workdir")
(folder / "made").write_text("half")
if sys.argv[3] == "with a child" and not os.fork():
    time.sleep(60)
print(folder.path, flush=True)
time.sleep(60)
"""


def folder(root: Path, uri: str) -> WorkFolder:
    return WorkFolder(root, "job", uri, field="$.runtime.workdir")


def holding(root: Path, uri: str, how: str = "alone") -> tuple[subprocess.Popen[str], Path]:
    """A process that holds the output's folder, and which that is."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root), uri, how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "one")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-one")
    return monkeypatch


def test_one_relative_output_is_another_in_each_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with folder(tmp_path / "work", "outputs/latex") as work:
            found.append(work.path)
    assert found[0] != found[1]


def test_all_spellings_of_a_local_output_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    spellings = ("real/out", "link/out", "./real/../real/out/", f"{tmp_path}/real/out")
    found = {json.dumps(storage.identity(uri)) for uri in spellings}
    found.add(json.dumps(storage.identity(f"file://{tmp_path}/link/out")))
    assert len(found) == 1


def test_one_s3_uri_is_another_on_each_server_and_for_each_account(
    aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def identity(uri: str = "s3://bucket/run", **environ: str) -> str:
        with aws.context() as patched:
            for name, value in environ.items():
                patched.setenv(name, value)
            return json.dumps(storage.identity(uri))

    profiles = tmp_path / "config"
    profiles.write_text("[profile other]\nendpoint_url = http://127.0.0.1:3\n")
    here, there = "http://127.0.0.1:1", "http://127.0.0.1:2"
    amazon = identity()
    found = [
        amazon,
        identity(AWS_ENDPOINT_URL=here),
        identity(AWS_ENDPOINT_URL=there),
        identity(AWS_ENDPOINT_URL=there, AWS_ACCESS_KEY_ID="two"),
        identity(AWS_CONFIG_FILE=str(profiles), AWS_PROFILE="other"),
        identity("s3://bucket/run-2"),
    ]
    assert len(set(found)) == len(found)
    assert identity(AWS_ENDPOINT_URL=here, AWS_SECRET_ACCESS_KEY="rotated") == found[1]
    assert identity("s3a://bucket/run/", AWS_ENDPOINT_URL_S3=here) == found[1]
    # Amazon's buckets are one namespace, and the keys of a role change every hour.
    assert identity(AWS_ACCESS_KEY_ID="two") == amazon
    assert not any("secret" in each or '"one"' in each for each in found)


def test_nothing_is_made_before_the_folder_is_needed(tmp_path: Path) -> None:
    with folder(tmp_path / "work", f"{tmp_path}/out"):
        pass
    assert not (tmp_path / "work").exists()


def test_a_folder_that_is_held_is_not_taken_and_who_has_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, held = holding(tmp_path, "memory://x")
    try:
        with folder(tmp_path, f"{tmp_path}/out") as own:
            assert own.path != held
        process_2, held_2 = holding(tmp_path, f"{tmp_path}/out")
        try:
            with folder(tmp_path, f"{tmp_path}/out") as own:
                assert own.path == held_2.with_name(f"{held_2.name}.2")
                assert not list(own.path.glob("made"))
            assert f"process {process_2.pid}" in capsys.readouterr().err
        finally:
            process_2.kill()
    finally:
        process.kill()


@pytest.mark.parametrize("how", ["alone", "with a child"])
def test_what_a_killed_run_left_is_found_at_once(how: str, tmp_path: Path) -> None:
    process, held = holding(tmp_path, f"{tmp_path}/out", how)
    process.kill()
    process.wait()
    started = time.monotonic()
    try:
        with folder(tmp_path, f"{tmp_path}/out") as own:
            assert own.path == held
            assert (own / "made").read_text() == "half"
        assert time.monotonic() - started < 10  # a child may live on for a minute
    finally:
        os.killpg(process.pid, signal.SIGKILL) if how != "alone" else None


@pytest.mark.parametrize("silent", [False, True])
def test_a_holder_on_another_machine_counts_as_alive_until_it_is_silent(
    silent: bool, tmp_path: Path
) -> None:
    with folder(tmp_path, f"{tmp_path}/out") as own:
        first = own.path
    holder = LockHolder(host="another", boot="another", process=1, since="2026")
    (first / LOCK_FILE).write_text(json.dumps(holder.__dict__))
    if silent:
        long_ago = time.time() - 2 * SILENT_SECONDS
        os.utime(first / LOCK_FILE, (long_ago, long_ago))
    with folder(tmp_path, f"{tmp_path}/out") as own:
        assert (own.path == first) == silent


def test_a_folder_that_is_removed_is_free_for_the_next_run(tmp_path: Path) -> None:
    own = folder(tmp_path, f"{tmp_path}/out")
    first = own.path
    (first / "merged").write_text("weights")
    own.remove()
    assert not list(tmp_path.iterdir())
    with folder(tmp_path, f"{tmp_path}/out") as again:
        assert again.path == first
        assert not (again.path / "merged").exists()


def test_a_work_folder_that_may_not_be_written_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"\$\.runtime\.workdir: is not writable"):
        _ = folder(tmp_path / "file" / "work", f"{tmp_path}/out").path

"""Faults between the job and its store: what passes is ridden out, what does not is told."""

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from job import storage
from job.artifacts.lease import Lease
from job.errors import InputError, JobError, StorageError
from job.families import model_source, weight_writing
from job.families.weight_files import Weights
from job.local import cache, eviction, file_digests
from job.pipeline import runner
from job.pipeline.stages import Stages
from job.spec.load import load_spec
from job.storage import connect, retry
from job.storage.digests import sha256_file
from job.train.checkpoint.storage import CheckpointStore
from tests.conftest import S3
from tests.faults.proxy import Fault, Proxy
from tests.jobs import ROOT, job, small_run
from tests.s3 import ROTATED, WRITER

DATA = bytes(range(256)) * 400


@pytest.fixture
def through(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Proxy]]:
    """Puts a proxy with faults before the server, and takes short waits between attempts."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.05)
    running = list[Proxy]()

    def begin(*faults: Fault) -> Proxy:
        proxy = Proxy(s3.server.endpoint, *faults)
        running.append(proxy.__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        return proxy

    yield begin
    for proxy in running:
        proxy.__exit__()


PASSING = {
    "500": Fault(kind="answer", times=3),
    "503 slow down": Fault(kind="answer", status=503, code="SlowDown", times=3),
    "reset": Fault(kind="reset", times=3),
    "stall": Fault(kind="stall", seconds=2, times=2),
    "truncated body": Fault(kind="truncate", matching="GET", times=2),
    "wrong bytes sent": Fault(kind="flip", matching="PUT", times=2),
    "wrong bytes received": Fault(kind="flip", matching="GET", times=2),
    "expired keys": Fault(kind="answer", status=403, code="ExpiredToken", times=2),
    # A refused HEAD and the GET that asks why; stores differ in the status they give.
    "expired keys, seen by a HEAD": Fault(
        kind="answer", status=403, code="ExpiredToken", matching="HEAD|GET", times=4
    ),
    "expired keys, seen by a HEAD of another status": Fault(
        kind="answer", status=400, code="ExpiredToken", matching="HEAD|GET", times=4
    ),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_a_fault_that_passes_costs_time_and_nothing_else(
    fault: Fault,
    s3: S3,
    through: Callable[..., Proxy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault.kind == "stall":
        monkeypatch.setattr(connect, "READ_SECONDS", 1.0)
    through(fault)
    storage.write_bytes(s3.uri("file"), DATA)
    storage.download(s3.uri("file"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert fault.hits == fault.times


LASTING = {
    "500": (Fault(kind="answer"), StorageError, "InternalError injected"),
    "503 slow down": (Fault(kind="answer", status=503, code="SlowDown"), StorageError, "SlowDown"),
    "reset": (Fault(kind="reset"), StorageError, "(?i)connection|disconnected"),
    "wrong bytes sent": (Fault(kind="flip"), StorageError, "XAmzContentSHA256Mismatch|BadDigest"),
    "full bucket": (
        Fault(kind="answer", status=403, code="QuotaExceeded"),
        StorageError,
        "no space left",
    ),
    "revoked key": (
        Fault(kind="answer", status=403, code="InvalidAccessKeyId"),
        InputError,
        "access denied: InvalidAccessKeyId",
    ),
    "expired keys": (
        Fault(kind="answer", status=403, code="ExpiredToken"),
        InputError,
        "access denied: ExpiredToken",
    ),
    "an hour's clock skew": (
        Fault(kind="answer", status=403, code="RequestTimeTooSkewed"),
        InputError,
        "set this machine's clock",
    ),
}


@pytest.mark.parametrize(("fault", "kind", "told"), LASTING.values(), ids=LASTING.keys())
def test_a_fault_that_lasts_ends_as_one_error_that_names_operation_uri_and_cause(
    fault: Fault, kind: type[JobError], told: str, s3: S3, through: Callable[..., Proxy]
) -> None:
    proxy = through(fault)
    with pytest.raises(kind, match=told) as raised:
        storage.write_bytes(s3.uri("file"), DATA)
    [problem] = raised.value.problems
    assert problem.field == s3.uri("file")
    assert "cannot write" in problem.message
    assert problem.fix
    lasting = ("QuotaExceeded", "InvalidAccessKeyId", "RequestTimeTooSkewed")
    attempts = 1 if fault.code in lasting else retry.RETRIES + 1
    sent = 2 if fault.kind == "reset" else 1  # aiohttp tries a kept connection, then a new one
    assert attempts <= len(proxy.requests) <= attempts * sent


def test_keys_refused_in_answer_to_a_head_are_told_with_the_reason(
    s3: S3, through: Callable[..., Proxy]
) -> None:
    fault = Fault(kind="answer", status=403, code="InvalidAccessKeyId", matching="HEAD|GET")
    proxy = through(fault)
    with pytest.raises(InputError, match="access denied: InvalidAccessKeyId injected"):
        storage.write_bytes(s3.uri("file"), DATA)
    assert [each.split()[0] for each in proxy.requests] == ["PUT", "HEAD", "GET"]


def refused(matching: str) -> Fault:
    return Fault(kind="answer", status=403, code="AccessDenied", matching=matching)


def test_checkpoints_that_may_not_be_read_are_neither_removed_nor_passed_over(
    s3: S3, through: Callable[..., Proxy], tmp_path: Path
) -> None:
    store = CheckpointStore(uri=s3.uri("checkpoints"), fingerprint="f")
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "state.json").write_text("{}")
    for step in (10, 20, 30):
        store.save(tmp_path / "step", step)
    through(refused(r"GET .*step-(20|30)/manifest\.json"))
    for ask in (
        lambda: store.prune(1, 30),
        lambda: store.latest(tmp_path / "resumed"),
        lambda: store.newest(),
    ):
        with pytest.raises(InputError, match="access denied: AccessDenied"):
            ask()
    assert store.steps() == (10, 20, 30)


def test_a_lease_that_may_not_be_read_is_not_taken_for_a_free_one(
    s3: S3, through: Callable[..., Proxy]
) -> None:
    first, second = Lease(s3.uri(".lease")), Lease(s3.uri(".lease"))
    first.acquire()
    proxy = through(refused(r"GET .*/1\.json"))
    with pytest.raises(InputError, match="access denied: AccessDenied"):
        second.acquire()
    proxy.faults.clear()
    first.check()
    first.release()


def test_a_store_without_conditional_puts_is_looked_at_first(
    s3: S3, through: Callable[..., Proxy]
) -> None:
    through(Fault(kind="answer", status=501, code="NotImplemented", matching="PUT", every=2))
    assert storage.write_new(s3.uri("new"), DATA)
    assert not storage.write_new(s3.uri("new"), b"other")
    assert storage.read_bytes(s3.uri("new")) == DATA


def test_keys_that_may_write_and_not_read_are_refused_before_any_work(
    s3: S3, through: Callable[..., Proxy]
) -> None:
    through(refused(r"GET .*/out/\.write-probe"))
    with pytest.raises(InputError, match="cannot read: access denied: AccessDenied"):
        storage.check_access(s3.uri("out"), "write")
    assert storage.list_files(s3.uri("out")) == ()


class Waits(threading.Event):
    """Takes the waits between attempts down, and waits for none."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = list[float]()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return False


def test_waits_between_attempts_grow_to_a_bound_and_differ(
    s3: S3, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(retry.RETRIES_VARIABLE, raising=False)
    tried = list[list[float]]()
    for _ in range(2):
        waits = Waits()
        with (
            Proxy(s3.server.endpoint, Fault(kind="answer")) as proxy,
            monkeypatch.context() as patch,
        ):
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            with (
                retry.abandoned_if_set(waits),
                pytest.raises(StorageError, match=f"after {retry.RETRIES + 1} attempts"),
            ):
                storage.write_bytes(s3.uri("file"), DATA)
        tried.append(waits.seconds)
    for seconds in tried:
        doubled = [retry.FIRST_WAIT * 2**n for n in range(retry.RETRIES)]
        for wait, least in zip(seconds, doubled, strict=True):
            most = min(least + retry.FIRST_WAIT, retry.LONGEST_WAIT)
            assert min(least, retry.LONGEST_WAIT) <= wait <= most
    assert tried[0] != tried[1]
    said = capsys.readouterr().err
    assert said.count("storage attempt failed operation=write") == 2 * retry.RETRIES


def test_parts_of_a_killed_upload_are_removed_from_our_folders_only(s3: S3) -> None:
    import boto3

    client = boto3.client("s3")
    for key in ("run/merged/a", "run/checkpoints/step-1/b", "run/other/merged/c", "d"):
        upload = client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
        client.upload_part(
            Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 100
        )
    assert storage.delete_unfinished(s3.uri("run"), ("merged", "checkpoints")) == 2
    left = client.list_multipart_uploads(Bucket=s3.bucket)["Uploads"]
    assert {each["Key"] for each in left} == {"run/other/merged/c", "d"}


@pytest.mark.slow
def test_a_whole_job_survives_every_kind_of_fault_at_once(s3: S3, tmp_path: Path) -> None:
    keys = tmp_path / "credentials"

    def give(pair: tuple[str, str]) -> None:
        lines = ("[default]", f"aws_access_key_id={pair[0]}", f"aws_secret_access_key={pair[1]}")
        keys.write_text("\n".join(lines) + "\n")

    give(WRITER)
    faults = (
        Fault(
            kind="answer",
            status=403,
            code="ExpiredToken",
            key=WRITER[0],
            first=60,
            then=lambda: give(ROTATED),
        ),
        # Rare enough that the few attempts of the first look at the output are not all hit.
        Fault(kind="answer", every=23),
        Fault(kind="answer", status=503, code="SlowDown", every=29),
        Fault(kind="reset", every=31),
        Fault(kind="truncate", matching="GET", every=7),
        Fault(kind="flip", matching="PUT", every=37),
    )
    with Proxy(s3.server.endpoint, *faults) as proxy:
        environ = {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "AWS_SHARED_CREDENTIALS_FILE": str(keys),
            "AWS_ACCESS_KEY_ID": "",
            "AWS_SECRET_ACCESS_KEY": "",
            "JOB_STORAGE_RETRIES": "7",
        }
        done = job(*small_run(s3.uri("out"), cache=tmp_path / "cache"), environ=environ)
    assert done.code == 0, done.err
    assert all(fault.hits for fault in faults), [fault.hits for fault in faults]
    assert storage.is_file(s3.uri("out/_SUCCESS"))
    print(f"{sum(fault.hits for fault in faults)} faults in {len(proxy.requests)} requests")


@pytest.mark.slow(minutes=1)
def test_other_bytes_than_were_stored_are_fetched_again_and_never_believed(
    s3: S3, tmp_path: Path
) -> None:
    assert job(*small_run(s3.uri("out"), cache=tmp_path / "a")).code == 0
    for times in (10**9, 1):
        flip = Fault(
            kind="flip", matching=r"GET .*/data/train-.*arrow", times=times, checksums=False
        )
        with Proxy(s3.server.endpoint, flip) as proxy:
            environ = {"AWS_ENDPOINT_URL": proxy.endpoint}
            changed = ("--set", "train.learning_rate=3e-3")  # another machine goes on
            cache = tmp_path / f"{times}"
            done = job(*small_run(s3.uri("out"), *changed, cache=cache), environ=environ)
        assert "a downloaded file has the wrong SHA-256" in done.err
        if times == 1:
            assert done.code == 0, done.err
        else:
            assert done.code == 21, done.err
            assert "its digest does not match" in done.err


@pytest.mark.slow
def test_a_fault_that_comes_in_training_ends_the_job_with_its_code(s3: S3, tmp_path: Path) -> None:
    fault = Fault(
        kind="answer", status=403, code="InvalidAccessKeyId", matching="PUT .*/checkpoints/"
    )
    with Proxy(s3.server.endpoint, fault) as proxy:
        environ = {"AWS_ENDPOINT_URL": proxy.endpoint}
        done = job(*small_run(s3.uri("out"), cache=tmp_path / "cache"), environ=environ)
    assert done.code == 12, done.err
    assert "access denied" in done.err
    assert "cannot write" in done.err
    assert s3.uri("out/checkpoints/step-2/") in done.err
    assert "Traceback" not in done.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("full", ["output", pytest.param("cache", marks=pytest.mark.slow)])
def test_a_full_local_disk_is_exit_21_and_names_the_place(
    full: str, small_disk: Path, tmp_path: Path
) -> None:
    output = small_disk / "out" if full == "output" else tmp_path / "out"
    cache = small_disk / "cache" if full == "cache" else tmp_path / "cache"
    done = job(*small_run(str(output), cache=cache))
    assert done.code == 21, done.err
    assert "no space left" in done.err
    assert "Traceback" not in done.err


def test_a_download_to_a_full_disk_names_where_it_goes(small_disk: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "model.safetensors", small_disk / "model.safetensors"
    source.write_bytes(bytes(5 * 2**20))
    with pytest.raises(StorageError, match="no space left") as caught:
        storage.download(str(source), target)
    assert caught.value.problems[0].field == str(target)
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("writer", ["shards", "safetensors"])
def test_a_full_disk_without_a_name_names_the_working_folder(
    writer: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's error names no file where a library writes to one that is open."""
    tensors = {f"{number}": torch.zeros(2**18) for number in range(8)}

    def fill(self: Stages, directory: Path) -> dict[str, Any]:
        if writer == "shards":
            weight_writing.write(Weights.of(tensors.items()), directory, max_shard_size="1GB")
        else:
            save_file(tensors, directory / "model.safetensors")
        return {}

    monkeypatch.setattr(Stages, "prep", fill)
    settings = [f"runtime.workdir={small_disk}", f"output.uri={tmp_path}/out"]
    text = (ROOT / "specs/latex.yaml").read_text()
    loaded = load_spec(text, "latex.yaml", [*settings, f"runtime.cache_dir={tmp_path}/cache"])
    with pytest.raises(StorageError, match="no space left on device") as caught:
        runner.run(loaded, "prep")
    [problem] = caught.value.problems
    assert problem.field.startswith(str(small_disk))
    assert "set runtime.workdir to a folder on a larger volume" in str(problem.fix)


def test_a_download_that_was_killed_goes_on_where_only_the_rest_of_it_fits(
    small_disk: Path, tmp_path: Path
) -> None:
    model, weights = f"memory://{tmp_path.name}", bytes(5 * 2**19)
    storage.write_bytes(f"{model}/config.json", b"{}")
    storage.write_bytes(f"{model}/model.safetensors", weights)
    spec = load_spec(
        (ROOT / "specs/latex.yaml").read_text(),
        "latex.yaml",
        [f"model.model_name_or_path={model}"],
        environ={},
    ).spec
    found = model_source.find_model(spec.model)
    there = small_disk / "models" / f".partial-{found.digest[:32]}" / "model.safetensors"
    there.parent.mkdir(parents=True)
    there.write_bytes(weights)
    known = file_digests.FileRecord.of(sha256_file(there), there.stat(), time.time_ns())
    cache._write(there.with_name(eviction.COMPLETE), {there.name: known})
    assert shutil.disk_usage(small_disk).free < found.size_bytes
    assert (model_source.fetch_model(found, small_disk) / "config.json").read_bytes() == b"{}"


def test_a_checkpoint_that_finds_no_room_is_not_taken_for_a_damaged_one(
    small_disk: Path, tmp_path: Path
) -> None:
    written = tmp_path / "written"
    written.mkdir()
    (written / "model.safetensors").write_bytes(bytes(5 * 2**20))
    store = CheckpointStore(uri=str(tmp_path / "checkpoints"), fingerprint="f")
    store.save(written, 4)
    with pytest.raises(StorageError, match="no space left"):
        store.latest(small_disk / "resumed")
    assert store.latest(tmp_path / "resumed") is not None

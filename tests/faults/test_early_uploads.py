"""Shards of weights that go up while the next is written, and what ends a job meanwhile."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from job import storage
from job.artifacts.output import Output
from job.artifacts.records import RunRecord
from job.cli.app import app
from job.errors import ProofError
from job.export.merge import Merge
from job.families import weight_files, weight_writing
from job.families.weight_files import NamedTensor, Weights
from tests.conftest import S3
from tests.faults.proxy import Fault, Proxy
from tests.jobs import Finished, Running, job, small_run, start

SHARDED = ("--set", "export.merged.max_shard_size=1MB")
FIRST, THIRD = r"PUT .*/merged/model-00001-of-", r"PUT .*/merged/model-00003-of-"
SHARD = re.compile(r"PUT .*/(merged/model-\d+-of-\d+\.safetensors)")


def merged(output: str) -> set[str]:
    """What a reader finds in `merged/`."""
    return {f"merged/{entry.path}" for entry in storage.list_files(f"{output}/merged")}


def wait_for(shard: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not shard():
        assert time.monotonic() < deadline, "no shard comes"
        time.sleep(0.02)


def sent(proxy: Proxy) -> list[str]:
    """The shards that were put, in order."""
    return [found[1] for request in proxy.requests if (found := SHARD.match(request))]


def require_whole(output: str) -> None:
    """Every file is what `SHA256SUMS` says, and `merged/` holds no other."""
    sums = storage.read_text(f"{output}/SHA256SUMS").splitlines()
    files = {path: digest for digest, path in (line.split("  ", 1) for line in sums)}
    assert {path for path in files if path.startswith("merged/")} == merged(output)
    for path in merged(output):
        stored = storage.read_bytes(f"{output}/{path}")
        assert hashlib.sha256(stored).hexdigest() == files[path], path
    index = json.loads(storage.read_text(f"{output}/merged/{weight_files.INDEX}"))
    assert {f"merged/{file}" for file in index["weight_map"].values()} <= merged(output)
    assert storage.is_file(f"{output}/_SUCCESS")


def test_a_shard_is_at_the_output_before_the_last_one_is_made(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {f"layer.{number}": torch.randn(64, 64) for number in range(5)}
    run = RunRecord(name="r", command="run", status="running", started="now")
    output = Output(uri=s3.uri("out"), workdir=tmp_path, run=run)
    first = output.at("merged", "model-00001-of-00005.safetensors")

    def tensors(names: Iterable[str]) -> Iterator[NamedTensor]:
        for number, name in enumerate(names):
            if number == len(held) - 1:
                wait_for(lambda: storage.is_file(first))
            yield name, held[name]

    with Proxy(s3.server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        output.acquire()
        output.stages.invalidate("export")
        weight_writing.write(
            replace(Weights.of(held.items()), tensors=tensors),
            output.stages.local.create("export") / "merged",
            max_shard_size="17KB",
            finished=lambda path: output.stages.upload_eagerly("export", path),
        )
        output.stages.publish("export", "f", "now", 1.0, {})
        output.release()
        assert sorted(sent(proxy)) == [
            f"merged/model-{number:05}-of-00005.safetensors" for number in range(1, 6)
        ]
        puts = [request for request in proxy.requests if request.startswith("PUT")]
    names = [request.split("/")[-1].split("?")[0] for request in puts]
    assert names.index(weight_files.INDEX) > names.index("model-00005-of-00005.safetensors")
    assert names[-1] == "export.json"
    record = output.stages.completed("export", "f")
    assert record is not None
    for file in record.files:
        assert hashlib.sha256(storage.read_bytes(output.at(file.path))).hexdigest() == file.sha256


def test_after_a_proof_that_failed_no_shard_is_left(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = s3.uri("out")
    more = (*SHARDED, "--set", "train.learning_rate=1e-12")
    prove = Merge._require_finite
    with Proxy(s3.server.endpoint) as proxy:

        def late(merge: Merge) -> None:  # weights as small as these are proven before they are sent
            wait_for(lambda: len(sent(proxy)) > 3)
            prove(merge)

        monkeypatch.setattr(Merge, "_require_finite", late)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(ProofError) as caught:
            app(small_run(output, *more, cache=tmp_path / "cache"), standalone_mode=False)
    assert caught.value.exit_code == 30
    assert "none of the 40 adapted tensors differs" in str(caught.value)
    assert len(sent(proxy)) > 3
    assert merged(output) == set()
    assert not storage.is_file(f"{output}/.stages/export.json")


def run_until(request: str, end: Callable[..., None], output: str, s3: S3, cache: Path) -> Finished:
    """A job that is ended in the moment in which it makes the request."""
    fault = Fault(kind="stall", matching=request, seconds=0.5, times=1)
    with Proxy(s3.server.endpoint, fault) as proxy:
        environ = {"AWS_ENDPOINT_URL": proxy.endpoint}
        process = start(*small_run(output, *SHARDED, cache=cache), environ=environ)
        fault.then = lambda: end(process)
        out, err = process.communicate(timeout=300)
        assert fault.hits, err
    assert process.returncode is not None
    return Finished(process.returncode, out, err)


@pytest.mark.slow
def test_a_job_killed_between_shards_ends_proven_when_it_is_started_again(
    s3: S3, tmp_path: Path
) -> None:
    output, cache = s3.uri("out"), tmp_path / "cache"
    killed = run_until(THIRD, lambda process: process.kill(), output, s3, cache)
    assert killed.code == -9
    assert merged(output)
    assert all("model-" in path for path in merged(output)), "nothing to load shards by"
    # A killed job with other shards left one too, by its own list of what it was to store.
    other, noted = "merged/model-00001-of-00099.safetensors", f"{output}/.stages/export"
    files = json.loads(storage.read_text(f"{noted}.unfinished.json"))["files"]
    assert set(files) >= merged(output)
    storage.write_text(f"{noted}.unfinished.json", json.dumps({"files": [*files, other]}))
    storage.write_text(f"{output}/{other}", "left")
    done = job(*small_run(output, *SHARDED, cache=cache))
    assert done.code == 0, done.err
    require_whole(output)


@pytest.mark.slow
def test_a_job_asked_to_stop_between_shards_leaves_none(s3: S3, tmp_path: Path) -> None:
    output, cache = s3.uri("out"), tmp_path / "cache"
    stored: set[str] = set()

    def end(process: Running) -> None:
        wait_for(lambda: merged(output))
        stored.update(merged(output))
        process.terminate()

    stopped = run_until(THIRD, end, output, s3, cache)
    assert stopped.code == 143, stopped.err
    left = merged(output)
    assert stored.isdisjoint(left), stopped.err
    # The store may yet take what was on its way when the job ended.
    assert all("model-" in path for path in left), "nothing to load shards by"
    done = job(*small_run(output, *SHARDED, cache=cache))
    assert done.code == 0, done.err
    require_whole(output)


@pytest.mark.slow
def test_a_store_that_refuses_a_shard_ends_the_job_with_its_code(s3: S3, tmp_path: Path) -> None:
    fault = Fault(kind="answer", status=403, code="QuotaExceeded", matching=FIRST)
    with Proxy(s3.server.endpoint, fault) as proxy:
        environ = {"AWS_ENDPOINT_URL": proxy.endpoint}
        done = job(*small_run(s3.uri("out"), *SHARDED, cache=tmp_path / "cache"), environ=environ)
    assert done.code == 21, done.err
    assert "no space left" in done.err
    assert "model-00001-of-" in done.err
    assert "Traceback" not in done.err
    assert merged(s3.uri("out")) == set()

"""A job that is killed at any moment, and started until it is done, ends as an undisturbed one.

The moments are drawn with a seed; JOB_KILL_SEED draws others, JOB_KILLS=42 more.
"""

import json
import os
import random
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from job import storage
from tests import warm
from tests.conftest import S3
from tests.jobs import small_run

SEED = int(os.environ.get("JOB_KILL_SEED", "20"))
KILLS = int(os.environ.get("JOB_KILLS", "14"))
IN_EACH = 2
"""Kills in each part of a run, before it may go on to the next."""
PARTS = ("run", "prep", "baseline", "train", "eval", "export", "card", "report")
OPENING_SECONDS = 0.3  # from the first line to the first stage
COMPARED = ("adapter/", "merged/model", "data/")

# Forked from a process that has the libraries loaded: starting anew takes most of a small run.
context = get_context("forkserver")
context.set_forkserver_preload(["tests.integration.preload"])

SETTINGS = {"data.train.limit": 24, "eval.max_samples": 4, "train.save_steps": 1}


def _run(arguments: list[str], environ: dict[str, str], said: str) -> None:
    """The job, in a process of its own."""
    warm.as_if_started()
    os.environ.update(environ)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    from job.cli.app import app
    from job.storage.backends import s3_writes

    s3_writes.PART = 5 * 2**20  # the least that S3 takes, so that a small model goes up in parts
    app(arguments, standalone_mode=False)


class Runs:
    """Starts of one job on one output."""

    def __init__(self, output: str, place: Path, environ: dict[str, str]) -> None:
        sets = [item for key, value in SETTINGS.items() for item in ("--set", f"{key}={value}")]
        self._arguments = small_run(output, *sets, cache=place / "cache")
        self._environ, self._said = environ, place / "said.txt"
        self.output = output

    def start(self) -> Any:
        self._said.unlink(missing_ok=True)
        process = context.Process(
            target=_run, args=(self._arguments, self._environ, str(self._said))
        )
        process.start()
        return process

    def said(self) -> str:
        return self._said.read_text() if self._said.exists() else ""

    def finish(self) -> None:
        process = self.start()
        process.join(120)
        assert process.exitcode == 0, self.said()

    def kill_in(self, part: str, after: float) -> bool:
        """Starts, kills `after` seconds into the part; False where the job was done before."""
        process = self.start()
        begun = "run name=" if part == "run" else f"{part}: started"
        while begun not in self.said():
            if not process.is_alive():
                process.join()
                assert process.exitcode == 0, self.said()
                return False
            if f"{part}: complete" in self.said():
                process.kill()
                process.join()
                return False
            time.sleep(0.005)
        time.sleep(after)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), self.said()
        return bool(process.exitcode == -9)

    def digests(self) -> dict[str, str]:
        lines = storage.read_text(storage.join(self.output, "SHA256SUMS")).splitlines()
        pairs = [line.split("  ", 1) for line in lines]
        return {path: digest for digest, path in pairs if path.startswith(COMPARED)}

    def seconds(self) -> dict[str, float]:
        run = json.loads(storage.read_text(storage.join(self.output, "run.json")))
        found = {name: stage["seconds"] for name, stage in run["stages"].items()}
        return {"run": OPENING_SECONDS, **found}


@pytest.mark.slow(minutes=3)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_job_killed_at_random_moments_ends_with_the_digests_of_an_undisturbed_one(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place, environ = str(tmp_path), dict[str, str]()
    if store == "s3":
        s3: S3 = request.getfixturevalue("s3")
        place, environ = s3.uri(), s3.environ
    undisturbed = Runs(f"{place}/undisturbed", tmp_path, environ)
    undisturbed.finish()
    expected, seconds = undisturbed.digests(), undisturbed.seconds()
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors"} <= expected.keys()

    draw, killed = random.Random(f"{SEED} {store}"), dict.fromkeys(PARTS, 0)
    outputs = 0
    while sum(killed.values()) < KILLS or 0 in killed.values():
        outputs += 1
        runs = Runs(f"{place}/killed-{outputs}", tmp_path / str(outputs), environ)
        (tmp_path / str(outputs)).mkdir()
        for part in PARTS:
            for _ in range(IN_EACH):
                killed[part] += runs.kill_in(part, draw.random() * seconds[part])
        runs.finish()
        assert runs.digests() == expected, f"{killed} with seed {SEED}"
    print(f"{store}: {sum(killed.values())} kills of {outputs} jobs: {killed}")
    if store == "s3":
        import boto3

        left = boto3.client("s3").list_multipart_uploads(Bucket=s3.bucket)
        assert not left.get("Uploads")

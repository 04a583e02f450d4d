"""Rendering many answers: processes, what is kept, and formulas that take too long."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.evaluation import render_match
from job.rewards import rendered
from job.rewards.rendered import RenderMatchReward
from job.rewards.reward import Scored


def answers(*pairs: tuple[str, str]) -> list[Scored]:
    return [Scored(answer=a, reference=r, prompt=None, row=n) for n, (a, r) in enumerate(pairs)]


MANY = answers(*((f"x_{{{n}}}+{n % 3}", f"{{x_{{{n}}}}} + 1") for n in range(40)))
EXPECTED = [float(number % 3 == 1) for number in range(40)]


@pytest.fixture
def parallel() -> Iterator[RenderMatchReward]:
    reward = RenderMatchReward(workers=2, min_parallel=32)
    yield reward
    reward.close()


def test_processes_give_the_rewards_that_one_gives_even_if_one_is_killed(
    parallel: RenderMatchReward,
) -> None:
    assert RenderMatchReward(workers=1)(MANY) == EXPECTED
    assert parallel(MANY) == EXPECTED
    [first, *_] = multiprocessing.active_children()
    os.kill(first.pid or 0, signal.SIGKILL)  # as the kernel does when memory is short
    more = answers(*((f"y_{{{n}}}", f"y_{{{n}}}") for n in range(40)))
    assert parallel(more) == [1.0] * 40


def test_a_text_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RenderMatchReward(workers=1)
    pairs = answers(("u", r"v^{2}"), (r"{v}^2", r"v^{2}"))
    assert reward(pairs) == [0, 1]
    monkeypatch.setattr(render_match, "ink", None)  # a call would fail
    assert reward(pairs) == [0, 1]


def test_only_recent_texts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendered, "KEPT", 3)
    reward = RenderMatchReward(workers=1)
    assert reward(MANY) == EXPECTED
    assert len(reward._inks) == 3
    assert reward(MANY) == EXPECTED


def test_a_formula_that_takes_too_long_gets_nothing_and_the_next_its_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ink = render_match.ink

    def slow(text: str) -> render_match.Ink | None:
        while text == "slow":
            pass
        return ink(text)

    ink("x")  # the first picture imports matplotlib
    monkeypatch.setattr(render_match, "ink", slow)
    monkeypatch.setattr(rendered, "CPU_SECONDS", 0.5)
    before = signal.getsignal(signal.SIGVTALRM)
    assert RenderMatchReward(workers=1)(answers(("slow", "x"), ("x", "x"))) == [0, 1]
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


PARENT = """
import multiprocessing, os, signal
from job.rewards.rendered import RenderMatchReward
from job.rewards.reward import Scored

if __name__ == "__main__":
    reward = RenderMatchReward(workers=2, min_parallel=2)
    reward([Scored(answer=f"x_{n}", reference=f"x^{n}", prompt=None, row=n) for n in range(9)])
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children of their parent's death")
def test_the_processes_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(rendered.__file__).parents[2])},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and not _zombie(pid) for pid in pids):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.05)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True

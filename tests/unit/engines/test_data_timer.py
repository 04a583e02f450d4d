"""The wait for data: measured where batches are fetched, and warned of."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from job import log, telemetry
from job.engines import data_timer
from job.engines.data_timer import DataTimer
from job.engines.device import Accelerator
from job.train.callbacks import progress
from job.train.callbacks.progress import WINDOW, ProgressCallback
from tests.unit.train.short_training import ROWS, short_training

PAUSE = 0.5


class Clock:
    """The timer's clock, which only `sleep` moves, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def slow(self, count: int) -> Iterator[int]:
        for number in range(count):
            self.sleep(PAUSE)
            yield number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(data_timer, "time", found)
    return found


def test_the_time_until_a_batch_counts_and_the_time_with_it_does_not(clock: Clock) -> None:
    slow_data, slow_steps = DataTimer(), DataTimer()
    assert list(slow_data.timed(clock.slow(5))) == [0, 1, 2, 3, 4]
    for _ in slow_steps.timed(iter(range(5))):
        clock.sleep(PAUSE)
    assert slow_data.seconds == 5 * PAUSE
    assert slow_steps.seconds == 0


def test_the_next_step_gets_the_remaining_batches(clock: Clock) -> None:
    batches, timer = clock.slow(4), DataTimer()
    first = timer.timed(batches)
    assert [next(first), next(first)] == [0, 1]
    del first
    assert list(timer.timed(batches)) == [2, 3]
    assert timer.seconds == 4 * PAUSE


class Rows(list[float]):
    """Numbers, each of which takes `pause` seconds to read."""

    def __init__(self, clock: Clock, pause: float) -> None:
        super().__init__(float(n) for n in range(ROWS))
        self.clock, self.pause = clock, pause

    def __getitem__(self, index: Any) -> Any:
        self.clock.sleep(self.pause)
        return super().__getitem__(index)


def waited(clock: Clock, pause: float, directory: Path) -> float:
    """Seconds that a short training waits for rows that take `pause` seconds each."""
    timer = DataTimer()
    trainer = short_training(
        directory,
        Rows(clock, pause),
        lambda rows: {
            "input_ids": torch.tensor(rows),
            "counted_tokens": len(rows),
            "tokens": 3,
            "images": 0,
        },
        timer,
        max_steps=4,
    )
    trainer.train()
    return timer.seconds


def test_the_wait_for_a_slow_data_set_is_measured(clock: Clock, tmp_path: Path) -> None:
    assert waited(clock, PAUSE, tmp_path) == ROWS * PAUSE
    assert waited(clock, 0, tmp_path) == 0


class Watched:
    """A training whose every step takes a second, a share of it waiting for data."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reported: list[telemetry.Step] = []
        self._data_timer, self._now = DataTimer(), 100.0
        self._arguments = TrainingArguments(output_dir=str(directory), dataloader_num_workers=3)
        self._state = TrainerState(max_steps=10 * WINDOW, epoch=0.0)
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self._now))
        cpu = Accelerator(kind="cpu", name="CPU", memory_bytes=2**30)
        history = directory / "history.jsonl"
        self._progress = ProgressCallback(cpu, history, self.reported.append, self._data_timer)
        self._progress.on_train_begin(self._arguments, self._state, TrainerControl())

    def steps(self, count: int, share: float) -> None:
        for _ in range(count):
            self._now += 1.0
            self._data_timer.seconds += share
            self._state.global_step += 1
            logs = {"loss": 1.0, "learning_rate": 1e-3}
            self._progress.on_log(self._arguments, self._state, TrainerControl(), logs)


def test_every_logged_step_reports_its_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path, monkeypatch)
    watched.steps(1, 0.25)
    watched.steps(1, 0.5)
    assert [(step.data_wait_seconds, step.data_wait_share) for step in watched.reported] == [
        (0.25, 0.25),
        (0.5, 0.5),
    ]
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [entry["data_wait_share"] for entry in history] == [0.25, 0.5]


def test_waiting_that_lasts_is_warned_of_once_with_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("text")
    watched = Watched(tmp_path, monkeypatch)
    watched.steps(1 + WINDOW, 0.1)
    assert "data loading is the bottleneck" not in capsys.readouterr().err
    watched.steps(3 * WINDOW, 0.5)
    logged = capsys.readouterr().err
    assert logged.count("data loading is the bottleneck share=50%") == 1
    assert "raise train.dataloader_num_workers, now 3" in logged


def test_the_start_of_workers_is_no_wait_to_warn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("text")
    watched = Watched(tmp_path, monkeypatch)
    watched.steps(1, 60.0)
    watched.steps(2 * WINDOW, 0.01)
    assert "data loading is the bottleneck" not in capsys.readouterr().err

"""A training that is killed, or stopped, before any of its changes to what is stored ends as an
undisturbed one: the same history, weights and checkpoints, byte by byte.

The schedules end at another rate than 0 or at 0, within an epoch or at its end: one step too many
shows in some of them only. JOB_KILL_EVERY=1 kills before every change, not before one of nine; each
training begins at another of them.
"""

import os
import signal
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests import warm
from tests.conftest import S3
from tests.integration.kills import VALIDATION, Found, Picked, Training, try_all

context = get_context("forkserver")
context.set_forkserver_preload(["tests.integration.preload"])

EVERY = int(os.environ.get("JOB_KILL_EVERY", "9"))

# Three steps are an epoch.
TRAININGS = {
    "constant, within an epoch": {
        "train.max_steps": 5,
        "train.save_steps": 2,
        "train.lr_scheduler_type": "constant",
        "train.warmup_steps": 0,
    },
    "cosine, within an epoch, logs between saves": {
        "train.max_steps": 4,
        "train.save_steps": 3,
        "train.logging_steps": 2,
        "train.lr_scheduler_type": "cosine",
        "train.warmup_steps": 1,
        "train.save_total_limit": 1,
    },
    "warm-up, at the end of an epoch, with workers": {
        "train.max_steps": -1,
        "train.num_train_epochs": 2,
        "train.save_steps": 2,
        "train.lr_scheduler_type": "constant_with_warmup",
        "train.warmup_steps": 4,
        "train.dataloader_num_workers": 2,
    },
    "validating, with a best step before the last": {
        "train.max_steps": 6,
        "train.save_steps": 3,
        "train.save_total_limit": 1,
        "train.lr_scheduler_type": "constant",
        "train.learning_rate": 0.02,
        "train.warmup_steps": 0,
        "data.train.limit": 12,
        "data.validation_fraction": 0.5,
        "train.per_device_eval_batch_size": 1,
        "train.eval_strategy": "steps",
        "train.eval_steps": 2,
        "train.load_best_model_at_end": "true",
        "train.early_stopping_patience": 2,
    },
    "linear, within an epoch by epochs": {
        "train.max_steps": -1,
        "train.num_train_epochs": 1.5,
        "train.save_steps": 2,
        "train.lr_scheduler_type": "linear",
        "train.warmup_steps": 1,
    },
}


VALIDATING = "validating, with a best step before the last"


def from_training_on(every: int, first: int, changes: list[str]) -> list[int]:
    """One of so many changes from the start of the training on."""
    begun = changes.index("delete .stages/train.json")
    return list(range(begun + first, len(changes), every))


def around_the_end(changes: list[str]) -> list[int]:
    """Before the last checkpoint is whole and after, while the oldest goes, and up to the marker
    of the stage."""
    last = max(n for n, each in enumerate(changes) if each.endswith("/manifest.json"))
    stored = max(n for n, each in enumerate(changes[: last + 1]) if each.startswith("put chec"))
    marker = changes.index("put .stages/train.json")
    return [stored, stored + 1, stored + 3, changes.index("put train/history.jsonl"), marker]


def within_validations(changes: list[str]) -> list[int]:
    """In the first validation and in the last, and before the first best checkpoint is whole."""
    batches = [n for n, each in enumerate(changes) if each == VALIDATION]
    best = next(n for n, each in enumerate(changes) if each.endswith("/manifest.json"))
    return [batches[1], batches[-2], best]


def _work(
    told: Connection,
    environ: dict[str, str],
    place: Path,
    root: str,
    training: Training,
    picked: Picked,
    sent: int,
) -> None:
    warm.as_if_started()
    os.environ.update(environ)
    told.send(try_all(place, root, training, picked, sent))


def killed(
    name: str,
    picked: Picked,
    place: Path,
    *,
    sent: int = signal.SIGKILL,
    root: str | None = None,
    environ: dict[str, str] | None = None,
) -> Found:
    """What came of kills of the training at the picked changes, in processes of their own."""
    hear, told = context.Pipe(duplex=False)
    training, root = Training(name, TRAININGS[name]), root or str(place)
    arguments = (told, environ or {}, place, root, training, picked, sent)
    process = context.Process(target=_work, args=arguments)
    process.start()
    told.close()
    found: Found = hear.recv()
    process.join()
    print(f"{name}: killed {found.killed} times")
    return found


def test_a_training_killed_around_its_end_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    found = killed("constant, within an epoch", around_the_end, tmp_path)
    assert not found.differing
    assert found.killed == 5


@pytest.mark.slow
def test_a_training_stopped_within_a_validation_ends_as_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    found = killed(VALIDATING, within_validations, tmp_path, sent=signal.SIGTERM)
    assert not found.differing
    assert found.killed == 3


@pytest.mark.slow(minutes=1)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_killed_before_any_change_ends_as_an_undisturbed_one(
    name: str, tmp_path: Path
) -> None:
    first = 2 * [*TRAININGS].index(name) % EVERY
    found = killed(name, partial(from_training_on, EVERY, first), tmp_path)
    assert not found.differing
    assert found.killed >= 27 // EVERY


@pytest.mark.slow(minutes=1)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", [*TRAININGS][1:2])
def test_a_training_stopped_before_any_change_ends_as_an_undisturbed_one(
    name: str, tmp_path: Path
) -> None:
    found = killed(name, partial(from_training_on, EVERY + 3, 1), tmp_path, sent=signal.SIGTERM)
    assert not found.differing
    assert found.killed >= 20 // EVERY


@pytest.mark.slow(minutes=1)
@pytest.mark.timeout(1500)
def test_a_training_killed_before_changes_of_a_bucket_ends_as_an_undisturbed_one(
    s3: S3, tmp_path: Path
) -> None:
    found = killed(
        "constant, within an epoch",
        partial(from_training_on, 2 * EVERY, 1),
        tmp_path,
        root=s3.uri("kills"),
        environ=s3.environ,
    )
    assert not found.differing
    assert found.killed >= 27 // (2 * EVERY)

"""The best validation and the early stop are those that Transformers would choose."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from job.engines.device import Accelerator
from job.errors import OutOfMemoryError
from job.spec.answer_kinds import ALL_METRICS, LOWER_IS_BETTER
from job.spec.load import load_spec
from job.train.checkpoint.storage import CheckpointStore
from job.train.out_of_memory import raise_if_validation_does_not_fit
from job.train.selection import Selection
from job.train.validation_rows import ValidationRows
from tests.jobs import ROOT

VALUES = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.35, 0.5, 0.9]), min_size=1, max_size=12)


def selection(**given: Any) -> Selection:
    settings = {"metric": "eval_loss", "greater_is_better": False, "patience": None, "threshold": 0}
    return Selection(**{**settings, **given})


def log(values: list[float], metric: str = "eval_loss") -> list[dict[str, float]]:
    """A step's loss before each validation, as the trainer logs them."""
    entries = []
    for step, value in enumerate(values, start=1):
        entries += [{"step": step, "loss": 9.0}, {"step": step, metric: value}]
    return entries


@given(VALUES, st.booleans(), st.integers(1, 4), st.sampled_from([0.0, 0.07, 0.15]))
def test_best_step_and_early_stop_are_those_of_transformers(
    values: list[float], greater: bool, patience: int, threshold: float
) -> None:
    own = selection(greater_is_better=greater, patience=patience, threshold=threshold)
    callback = EarlyStoppingCallback(patience, threshold)
    arguments = TrainingArguments(
        output_dir="/nonexistent",
        metric_for_best_model="eval_loss",
        greater_is_better=greater,
        use_cpu=True,
    )
    state, control = TrainerState(), TrainerControl()
    for step, value in enumerate(values, start=1):
        callback.on_evaluate(arguments, state, control, {"eval_loss": value})
        better = np.greater if greater else np.less
        if state.best_metric is None or better(value, state.best_metric):
            state.best_metric, state.best_global_step = value, step
        seen = log(values[:step])
        best = own.best(seen)
        assert best is not None
        assert (best.step, best.value) == (state.best_global_step, state.best_metric)
        assert own.stops(seen) == control.should_training_stop
        if control.should_training_stop:
            break


def test_a_value_that_is_not_finite_is_never_the_best_and_no_improvement() -> None:
    own = selection(patience=2)
    assert own.best(log([math.nan, math.inf])) is None
    assert own.errors(log([math.nan, 3.0])) == {2: 3.0}
    best = own.best(log([math.nan, 3.0, math.nan]))
    assert best is not None
    assert best.step == 2
    assert not own.stops(log([3.0, math.nan]))
    assert own.stops(log([3.0, math.nan, math.nan]))


def test_validations_before_another_trainings_checkpoint_do_not_count() -> None:
    own = selection(patience=2, since=2)
    seen = log([0.1, 0.2, 0.5])
    best = own.best(seen)
    assert best is not None
    assert best.step == 3
    assert own.without_improvement(seen) == 0


def test_a_step_whose_checkpoint_is_not_stored_is_not_the_best() -> None:
    own = selection(unavailable=frozenset({1}))
    best = own.best(log([0.1, 0.3, 0.2]))
    assert best is not None
    assert best.step == 3


@pytest.mark.parametrize("metric", sorted(ALL_METRICS))
def test_every_metric_has_a_direction_and_only_errors_are_to_fall(metric: str) -> None:
    falls = metric in ("loss", "cer", "wer", "token_edit_distance")
    assert (metric in LOWER_IS_BETTER) == falls


def test_the_best_by_validation_is_kept_whatever_its_training_loss(tmp_path: Path) -> None:
    store = CheckpointStore(uri=str(tmp_path / "checkpoints"), fingerprint="x")
    for step, loss in ((1, 9.0), (2, 0.1), (3, 5.0), (4, 4.0)):
        files = tmp_path / str(step)
        files.mkdir()
        (files / "trainer_state.json").write_text("{}")
        store.save(files, step, loss, {"eval_loss": 1.0})
    store.prune(1, 4, {1: 0.5, 2: 0.7, 3: 0.5, 99: 0.1})
    assert store.steps() == (1, 4)


@pytest.mark.parametrize(
    ("rows", "fix"),
    [
        (8, "--set train.per_device_eval_batch_size=4"),
        (1, "lower data.max_pixels or train.max_length"),
    ],
)
def test_validation_rows_that_do_not_fit_name_the_keys_of_evaluation(rows: int, fix: str) -> None:
    spec = load_spec((ROOT / "specs" / "latex.yaml").read_text(), "latex.yaml").spec
    train = replace(spec.train, per_device_eval_batch_size=rows)
    device = Accelerator(kind="cuda", name="H200", memory_bytes=2**37)
    with pytest.raises(OutOfMemoryError) as told:
        raise_if_validation_does_not_fit(torch.OutOfMemoryError(), train, device)
    [problem] = told.value.problems
    assert problem.field == "$.train.per_device_eval_batch_size"
    assert problem.fix == fix


def test_validation_batches_have_the_asked_rows_or_more_up_to_the_tokens() -> None:
    lengths = (30, 10, 20, 10, 50)
    rows = ValidationRows(rows=(), dataset=SimpleNamespace(lengths=lengths), dropped=0)  # type: ignore[arg-type]
    assert rows.batches(2) == [[4, 0], [2, 1], [3]]
    assert rows.batches(2, 100) == [[4, 0, 2], [1, 3]]
    assert rows.batches(2, 1000) == [[4, 0, 2, 1, 3]]

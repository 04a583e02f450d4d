"""What a training shows of its validations: in lines, on a terminal, and after a resume."""

import json
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from job import log, telemetry
from job.engines.data_timer import DataTimer
from job.engines.device import Accelerator
from job.train.callbacks.progress import ProgressCallback
from job.train.selection import Selection
from job.train.throughput import Throughput
from tests.terminal import on_terminal

MEASURED = {2: 0.75, 4: 0.25, 6: 0.5}
"""The metric after validations at these steps."""
STEPS = 8


class Training:
    """Calls the callback as the Trainer does: logs every step, and validates some."""

    def __init__(
        self, directory: Path, resumed_at: int = 0, throughput: Throughput | None = None
    ) -> None:
        self.steps: list[telemetry.Step] = []
        self.validations: list[telemetry.Validation] = []
        selection = Selection(
            metric="eval_cer", greater_is_better=False, patience=None, threshold=0.0
        )
        self._progress = ProgressCallback(
            Accelerator(kind="cpu", name="CPU", memory_bytes=2**30),
            directory / "history.jsonl",
            self.steps.append,
            DataTimer(),
            report_validation=self.validations.append,
            selection=selection,
            throughput=throughput,
        )
        self._arguments = TrainingArguments(output_dir=str(directory))
        self._state = TrainerState(max_steps=STEPS, epoch=0.0, global_step=resumed_at)
        for step in range(1, resumed_at + 1):
            self._state.log_history += self._logged(step)
        self._progress.on_train_begin(self._arguments, self._state, TrainerControl())

    def run(self, until: int = STEPS) -> None:
        state, control = self._state, TrainerControl()
        while state.global_step < until:
            state.global_step += 1
            state.num_input_tokens_seen += 1000
            for entry in self._logged(state.global_step):
                state.log_history.append(entry)
                if "loss" in entry:
                    self._progress.on_log(self._arguments, state, control, entry)
                else:
                    metrics = {k: v for k, v in entry.items() if k.startswith("eval_")}
                    self._progress.on_evaluate(self._arguments, state, control, metrics)
            self._progress.on_step_end(self._arguments, state, control)
        self._progress.on_train_end(self._arguments, state, control)

    def _logged(self, step: int) -> list[dict[str, float]]:
        entries = [{"step": step, "epoch": 0.0, "loss": 1.0, "learning_rate": 1e-3}]
        if step in MEASURED:
            metrics = {"eval_loss": 2.0, "eval_cer": MEASURED[step], "eval_seconds": 0.5}
            entries.append({"step": step, "epoch": 0.0, **metrics})
        return entries


def test_each_validation_is_a_line_with_the_best_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    training = Training(tmp_path)
    training.run()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = [line for line in lines if line["event"] == "validation"]
    assert [
        (line["step"], line["eval_cer"], line["best_step"], line["best_eval_cer"]) for line in told
    ] == [(2, 0.75, 2, 0.75), (4, 0.25, 4, 0.25), (6, 0.5, 4, 0.25)]
    assert [(each.step, each.best) for each in training.validations] == [
        (2, True), (4, True), (6, False),
    ]  # fmt: skip
    assert training.validations[0].metrics == {"eval_loss": 2.0, "eval_cer": 0.75}
    assert training.validations[0].seconds == 0.5


def test_lines_and_history_tell_what_each_device_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("json")
    known = Throughput(flops_per_token=12e9, devices=2, peak_tflops=1e-3)
    training = Training(tmp_path, throughput=known)
    training.run()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    told = [line for line in (*lines, *history) if "loss" in line]
    assert len(told) == 2 * STEPS
    for line in told:
        computed = line["tokens_per_second"] * 12e9 / 2 / 1e12
        assert line["tflops"] == pytest.approx(computed, rel=0.01, abs=1e-3)
        assert line["mfu"] == pytest.approx(computed / 1e-3, rel=0.01, abs=1)


@pytest.mark.parametrize(
    ("at", "known"), [(0, []), (3, [(2, True)]), (5, [(4, True)]), (7, [(4, True), (6, False)])]
)
def test_a_resumed_training_tells_at_once_what_was_validated_before(
    at: int, known: list[tuple[int, bool]], tmp_path: Path
) -> None:
    training = Training(tmp_path, resumed_at=at)
    assert [(each.step, each.best) for each in training.validations] == known
    status = telemetry.Status("latex", "1")
    for each in training.validations:
        status.set_validation(each)
    best, last = status.snapshot.best, status.snapshot.validation
    assert (best and best.step) == max((step for step, is_best in known if is_best), default=None)
    assert (last and last.step) == max((step for step, _ in known), default=None)


def test_the_bar_shows_the_last_validation_and_the_best_at_80_columns(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.unit.train.test_progress import Training
Training(Path({str(tmp_path)!r})).run(until=7)
"""
    shown = on_terminal([sys.executable, "-c", code])
    assert shown.code == 0, shown.text
    assert "eval_cer 0.5  best 0.25 at 4" in shown.text
    assert "7/8" in shown.text

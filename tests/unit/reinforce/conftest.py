"""Runs the reinforce stage on the tiny model and rows of formulas."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job import engines, families
from job.engines.stored_adapter import StoredAdapter
from job.prep import formulas
from job.prep.images import inspect
from job.prep.rows import Message, Part, Row
from job.reinforce.reinforce import reinforce
from job.reinforce.result import ReinforceResult
from job.rewards.named import NamedReward
from job.spec.types import JobSpec
from job.train.checkpoint.storage import CheckpointStore
from job.train.trackers import TrackerFiles
from job.train.train_context import TrainContext
from tests.unit.reinforce.stage import CPU, TINY, by_length, spec_of


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    made = spec_of().data.train[0].formulas
    drawn = [formulas.sample(made, number) for number in range(4)]
    return [
        Row(
            id=f"formulas:{number}",
            messages=(
                Message(role="user", parts=(Part(image=0), Part(text="Write it."))),
                Message(role="assistant", parts=(Part(text=each.latex),)),
            ),
            images=(inspect(each.png),),
        )
        for number, each in enumerate(drawn)
    ]


@pytest.fixture(scope="module")
def family() -> families.Family:
    spec = spec_of()
    return families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)


@pytest.fixture
def run(
    tmp_path: Path, rows: list[Row], family: families.Family
) -> Callable[..., tuple[ReinforceResult, Path]]:
    def run_stage(
        name: str,
        spec: JobSpec,
        score: Any = by_length,
        store: str | None = None,
        start: StoredAdapter | None = None,
    ) -> tuple[ReinforceResult, Path]:
        engine = engines.create(spec.model, spec.lora, CPU)
        directory = tmp_path / name
        context = TrainContext(
            spec=spec,
            engine=engine,
            accelerator=CPU,
            family=family,
            start=start,
            data=SimpleNamespace(rows=lambda split: rows),  # type: ignore[arg-type]
            directory=directory,
            scratch=directory / "scratch",
            checkpoints=CheckpointStore(
                uri=str(tmp_path / (store or name) / "checkpoints"), fingerprint="f"
            ),
            trackers=TrackerFiles((), directory / "logs", str(directory / "uploaded")),
            publish=lambda path: None,
            check_lease=lambda: None,
            report_step=lambda step: None,
            report_validation=lambda validation: None,
            answer_metrics=None,
        )
        reward = NamedReward(name="test", weight=1.0, score=score)
        _, result = reinforce(context, engine.load(family), (reward,))
        return result, directory / "reinforced"

    return run_stage

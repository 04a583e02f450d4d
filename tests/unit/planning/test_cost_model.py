"""The time of every stage follows from measured jobs, with an error; without, there is none."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import RESULTS
from job.engines.device import Accelerator
from job.planning import facts
from job.planning.cost_model import CostModel, MeasuredJob, measured_jobs, stage_seconds
from job.planning.job_time import job_time
from job.planning.stage_work import RATES, STAGES, Work, stage_quantities
from tests.jobs import ROOT

GIB = 2**30
WORK = Work(
    parameters=29_399_294_336,
    layers=28,
    base_bytes=55 * GIB,
    merged_bytes=55 * GIB,
    trainable=240_000_000,
    prep_rows=1098,
    train_rows=998,
    validated_tokens=0,
    steps=60,
    passes=60,
    tokens=60 * 531,
    compiled=False,
    four_bit=False,
    answers=100,
    new_tokens=128,
    slots=100,
)
H200 = "NVIDIA H200"
REFERENCE = "reference-job-28b-h200.json"
"""The reference job on one H200, as `python -m benchmarks.reference_job` names its result."""


def a_job(work: Work, times: float = 1.0, stages: tuple[str, ...] = STAGES) -> MeasuredJob:
    """A job on a device whose rates are not those to start from, and differ from each other."""
    rates = {
        name: rate.gpu * times * (0.6 + 0.1 * (number % 7))
        for number, (name, rate) in enumerate(RATES.items())
    }
    seconds = {
        stage: sum(rates[name] * amount for name, amount in quantities.items())
        for stage, quantities in stage_quantities(work, stages).items()
    }
    return MeasuredJob(source="reference.json", device=H200, cores=None, work=work, seconds=seconds)


def model(*jobs: MeasuredJob, device: str = H200, cores: int | None = None) -> CostModel | None:
    return CostModel.of(jobs, device, cores, WORK)


@pytest.mark.parametrize("times", [0.1, 0.5, 30])
def test_one_measured_job_is_met_in_every_stage_and_in_all(times: float) -> None:
    measured = a_job(WORK, times)
    fitted = model(measured)
    assert fitted is not None
    found = fitted.estimate(WORK, STAGES)
    for stage, seconds in measured.seconds.items():
        assert found[stage].seconds == pytest.approx(seconds, rel=0.05), stage
        assert 0.1 <= found[stage].error <= 0.25, stage


def test_more_measured_jobs_tell_steps_from_tokens() -> None:
    jobs = [
        a_job(replace(WORK, steps=n, passes=n, tokens=n * tokens), stages=("start", "train"))
        for n, tokens in ((60, 531), (40, 2330), (20, 13_935))
    ]
    fitted = model(*jobs, a_job(WORK))
    assert fitted is not None
    between = replace(WORK, steps=100, passes=100, tokens=100 * 6_000)
    found = fitted.estimate(between, STAGES)
    assert found["train"].seconds == pytest.approx(a_job(between).seconds["train"], rel=0.1)


def test_what_is_far_from_what_was_measured_says_so() -> None:
    fitted = model(a_job(WORK))
    assert fitted is not None
    longer = fitted.estimate(replace(WORK, steps=6000, passes=6000, tokens=6000 * 531), STAGES)
    assert longer["train"].error == 0.5
    assert longer["export"].error < 0.5


def test_there_is_no_estimate_for_another_device_or_model() -> None:
    assert model(a_job(WORK), device="NVIDIA A100") is None
    assert model(a_job(WORK), cores=2) is None
    smaller = replace(WORK, parameters=WORK.parameters // 4)
    assert CostModel.of([a_job(WORK)], H200, None, smaller) is None
    assert CostModel.of([a_job(WORK)], H200, None, replace(WORK, four_bit=True)) is None
    fewer_layers = replace(WORK, parameters=WORK.parameters // 4, layers=7)
    assert CostModel.of([a_job(WORK)], H200, None, fewer_layers) is not None


def time_of(skipped: tuple[str, ...] = (), price: float | None = None) -> facts.JobTime:
    device = Accelerator(kind="cuda", name=H200, memory_bytes=141 * GIB)
    found = job_time(
        [a_job(WORK)], device, "h200", WORK, answer_tokens=32, skipped=skipped, price_per_hour=price
    )
    assert found is not None
    return found


def test_stages_that_are_complete_take_no_time_and_the_next_loads_the_model() -> None:
    whole, resumed = time_of(), time_of(skipped=("prep", "baseline"))
    before = {stage.stage: stage for stage in whole.stages}
    after = {stage.stage: stage for stage in resumed.stages}
    assert [*after] == ["start", "train", "eval", "export", "finish"]
    assert after["train"].longest > before["train"].longest
    assert resumed.total.longest < whole.total.longest


def test_answers_may_end_early_and_cost_follows_time() -> None:
    found = time_of(price=3.6)
    by_stage = {stage.stage: stage for stage in found.stages}
    assert by_stage["eval"].shortest < 0.8 * by_stage["eval"].longest
    assert by_stage["export"].shortest == by_stage["export"].longest
    assert found.total.longest == pytest.approx(sum(s.longest for s in found.stages), abs=0.5)
    assert found.total.cost_to == pytest.approx(found.total.longest / 1000, abs=1e-3)


def test_a_run_that_was_cut_short_is_no_measurement(tmp_path: Path) -> None:
    run: dict[str, Any] = {
        "device": H200,
        "complete": True,
        "work": vars(WORK),
        "before_first_stage_seconds": 8.0,
        "total_seconds": 50.0,
        "stages": {"prep": {"started": 8.0, "seconds": 2.0}, "train": {"seconds": 30.0}},
    }
    (tmp_path / "reference-a.json").write_text(json.dumps(run))
    (tmp_path / "reference-b.json").write_text(json.dumps({**run, "complete": False}))
    [job] = measured_jobs(tmp_path)
    assert job.seconds == {"start": 8.0, "prep": 2.0, "train": 30.0, "finish": 10.0}


def records() -> dict[str, Mapping[str, Any]]:
    """The committed results of whole jobs, by file."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("reference-job-*.json"))
    found = {path.name: json.loads(path.read_text()) for path in paths}
    return {name: record for name, record in found.items() if record.get("complete")}


@pytest.mark.parametrize("name", sorted({*records(), REFERENCE}))
def test_a_plan_of_a_measured_job_is_within_a_quarter_of_each_long_stage_and_of_all(
    name: str,
) -> None:
    if name not in records():
        pytest.skip(f"{RESULTS.name}/{name} is not measured yet")
    record = records()[name]
    work = record["planned"]["work"]
    planned = Work(**{key: work[key] for key in Work.__dataclass_fields__})
    # A plan tells a range for the length of answers, which only the model knows.
    planned = replace(planned, new_tokens=record["work"]["new_tokens"])
    fitted = CostModel.of(measured_jobs(), record["device"], record.get("cores"), planned)
    assert fitted is not None
    took = stage_seconds(record)
    found = fitted.estimate(planned, tuple(took))
    total = sum(stage.seconds for stage in found.values())
    assert total == pytest.approx(record["total_seconds"], rel=0.25)
    for stage, seconds in took.items():
        if seconds > 20:
            assert found[stage].seconds == pytest.approx(seconds, rel=0.25), stage

"""A plan for several processes: rows, memory, time and cost, from what was measured of them."""

import json
from pathlib import Path

import pytest

from job import planning
from job.errors import UsageError
from job.planning import facts, scaling
from job.planning.accelerators import ACCELERATORS
from job.planning.job_time import job_time
from job.planning.scaling import Scaling
from job.spec.load import LoadedSpec, load_spec
from tests.jobs import ROOT
from tests.unit.planning.test_cost_model import H200, WORK, a_job

TWO = Scaling(source="processes-2.json: two", device=H200, processes=2, efficiency=0.9)
EIGHT = Scaling(source="processes-8.json: eight", device=H200, processes=8, efficiency=0.8)


def loaded(name: str, *overrides: str) -> LoadedSpec:
    return load_spec((ROOT / f"specs/{name}.yaml").read_text(), name, overrides, {})


def made(processes: int | None, *overrides: str) -> facts.Plan:
    spec = loaded("latex", *overrides)
    return planning.make_plan(
        planning.PlanOptions(loaded=spec, accelerator="h200", processes=processes)
    )


def test_only_runs_that_were_compared_with_one_process_are_read(tmp_path: Path) -> None:
    compared = {
        "4 processes, 4 rows each, ddp": {"speed_by_one": 3.6, "losses_off": 0.001},
        "4 processes, 16 rows each, ddp, compiled": {"speed_by_one": 3.8},
        "4 processes, 4 rows each, fsdp2": {"speed_by_one": 2.0},
        "2 processes, 4 rows each, ddp": {"losses_off": 0.001},
    }
    result = {"device": H200, "compared": compared}
    (tmp_path / "processes-4-h200.json").write_text(json.dumps(result))
    found = list(scaling.measured_scalings(tmp_path))
    assert [(each.processes, each.efficiency) for each in found] == [
        (4, pytest.approx(0.9)),
        (4, pytest.approx(0.95)),
    ]
    assert found[0].source == "processes-4-h200.json: 4 processes, 4 rows each, ddp"
    assert found[0].device == H200


def test_every_committed_result_tells_an_efficiency() -> None:
    found = list(scaling.measured_scalings())
    assert found
    assert all(0.5 < each.efficiency < 1.05 for each in found)


@pytest.mark.parametrize(("processes", "expected"), [(2, TWO), (3, TWO), (5, EIGHT), (64, EIGHT)])
def test_the_closest_number_of_processes_is_taken(processes: int, expected: Scaling) -> None:
    better = Scaling(source="", device=H200, processes=2, efficiency=0.95)
    known = (EIGHT, better, TWO)
    assert scaling.scaling_of(known, "h200", processes) == expected
    assert scaling.scaling_of(known, "NVIDIA H100", processes) is None


@pytest.mark.parametrize(("processes", "error"), [(2, 0.2), (4, 0.5)])
def test_only_training_takes_longer_and_every_device_is_paid_for(
    processes: int, error: float
) -> None:
    def time(count: int, measured: Scaling | None) -> facts.JobTime:
        found = job_time(
            [a_job(WORK)],
            ACCELERATORS["h200"].device(),
            "h200",
            WORK,
            answer_tokens=50,
            skipped=(),
            price_per_hour=4.0,
            processes=count,
            scaling=measured,
        )
        assert found is not None
        return found

    alone, together = time(1, None), time(processes, TWO)
    assert together.sources == (*alone.sources, TWO.source)
    for one, several in zip(alone.stages, together.stages, strict=True):
        is_training = one.stage == "train"
        slower = 1 / TWO.efficiency if is_training else 1
        assert several.longest == pytest.approx(one.longest * slower, abs=0.1)
        assert one.cost_to is not None
        assert several.cost_to == pytest.approx(
            one.cost_to * slower * processes, rel=1e-2, abs=2e-4
        )
        assert several.error == (pytest.approx(error, abs=0.05) if is_training else one.error)


def test_processes_share_the_rows_of_an_epoch() -> None:
    alone, together = made(None), made(4)
    assert (alone.steps.processes, together.steps.processes) == (1, 4)
    assert together.steps.rows_a_step == alone.steps.rows_a_step
    assert alone.steps.an_epoch is not None
    assert together.steps.an_epoch == -(-alone.steps.an_epoch // 4)
    assert together.steps.total == alone.steps.total  # max_steps
    assert alone.validation is not None
    assert together.validation is not None
    assert alone.validation.share is not None
    assert together.validation.share == pytest.approx(alone.validation.share / 4, abs=1e-4)
    lines = [" ".join(line.split()) for line in planning.text(together).splitlines()]
    rows = alone.steps.rows_a_step
    assert f"rows per step {4 * rows}: {rows} of each process" in lines
    assert "processes 4, on an accelerator each" in lines
    assert any(line.startswith("with 4 GPUs") for line in lines)


def test_weights_are_divided_by_as_many_processes_as_are_named() -> None:
    sharded = ("lora={method: full}", "runtime.distributed=fsdp2", "train.optim=auto")
    states = []
    for processes in (2, 16):
        plan = made(processes, *sharded)
        assert plan.time_unknown == "no training with fsdp2 was measured"
        assert plan.memory is not None
        [fit] = plan.memory.fits
        assert fit.processes == processes
        states.append(fit.parts["optimizer"])
    assert states[0] == pytest.approx(8 * states[1], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "processes", "setting", "said"),
    [
        ("latex", 2, "runtime.distributed=none", "is more than one, but runtime.distributed"),
        ("latex", 1, "runtime.distributed=ddp", "is one, but runtime.distributed is ddp"),
        ("latex-grpo", 2, "runtime.distributed=auto", "but reinforce runs in one process"),
    ],
)
def test_a_number_that_a_run_would_refuse_is_refused(
    name: str, processes: int, setting: str, said: str
) -> None:
    order = planning.PlanOptions(loaded=loaded(name, setting), processes=processes)
    with pytest.raises(UsageError, match=said) as caught:
        planning.make_plan(order)
    assert caught.value.exit_code == 2

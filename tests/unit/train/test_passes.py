"""A step has the same loss and gradients however many passes compute it."""

from dataclasses import replace

import pytest
import torch

from job.spec.types import JobSpec
from tests.unit.train.test_capturing import spec_with, trained


def spec(**train: object) -> JobSpec:
    given = spec_with("train.router_aux_loss_coef=0", "train.cuda_graphs=false")
    changed = {"max_steps": 2, "gradient_checkpointing": "auto", **train}
    return replace(given, train=replace(given.train, **changed))  # type: ignore[arg-type]


def test_two_passes_of_two_rows_and_one_of_four_give_the_same_training() -> None:
    one_pass, losses, norms, weights = trained(spec(fit="on"))
    two_passes, *divided, _ = trained(spec())
    layouts = [
        [result.computing[key] for key in ("rows_a_pass", "passes_a_step")]
        for result in (one_pass, two_passes)
    ]
    assert layouts == [[4, 1], [2, 2]]
    assert one_pass.fit["too_large"] == []
    assert two_passes.fit is None
    assert [losses, norms] == [pytest.approx(each, rel=1e-5) for each in divided]
    assert not one_pass.computing["gradient_checkpointing"]

    recomputed, *same, equal = trained(spec(fit="on", gradient_checkpointing=True))
    assert recomputed.computing["gradient_checkpointing"]
    assert same == [losses, norms]
    assert all(torch.equal(weights[name], equal[name]) for name in weights)

"""Every way to compute is tried on the GPU that is there, in a process of its own."""

from pathlib import Path

import pytest
import torch

from job.engines import ways
from job.engines.device import gpu
from job.families.ernie45_vl.packed import varlen_trial
from job.families.grouped_products import choice
from job.families.outcome import Outcome

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def refuse(names: object) -> list[Outcome]:
    raise AssertionError(f"tried again: {names}")


def test_every_way_is_tried_compared_and_timed_and_the_next_start_does_not_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(varlen_trial, "_known", [])
    found = ways.find(gpu(0), tmp_path)
    assert [each.way for each in found.outcomes] == list(ways.TRAINING)
    for outcome in found.outcomes:
        print(outcome.way, outcome)
        assert not outcome.untried, outcome
        assert (outcome.milliseconds is not None) >= outcome.taken, outcome
    # Whatever the vendor, one of the two grouped products serves, and so do graphs.
    for dtype in ("bfloat16", "float32"):
        kernels = [ways.grouped(kernel, dtype) for kernel in ways.KERNELS]
        assert not all(found.obstacle(kernel) for kernel in kernels)
    assert found.obstacle(ways.CAPTURED) is None
    lasting = [each.way for each in found.outcomes if not each.passing]
    again = ways.find(gpu(0), tmp_path, lasting, run=refuse)
    assert again.outcomes == tuple(each for each in found.outcomes if not each.passing)

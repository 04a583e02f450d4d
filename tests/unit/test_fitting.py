"""How a step is divided until it fits."""

from typing import Any

import pytest

from job.engines.device import Accelerator
from job.spec.load import load_spec
from job.train import fitting
from job.train.fitting import Division, find, fitted_to_memory, largest
from tests.jobs import ROOT


def division(rows: int, passes: int, checkpointing: bool) -> Division:
    return Division(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=passes,
        gradient_checkpointing=checkpointing,
    )


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 15, 32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_smaller_division_has_the_rows_of_the_first(rows: int, checkpointing: bool) -> None:
    start = division(rows, 3, checkpointing)
    found, too_large = find(start, lambda _: False)
    assert found is None
    assert too_large[0] == start
    for each in too_large:
        assert each.per_device_train_batch_size * each.gradient_accumulation_steps == rows * 3
    sizes = [each.per_device_train_batch_size for each in too_large]
    assert sizes == sorted(sizes, reverse=True)
    assert too_large[-1] == division(1, rows * 3, True)


def test_rows_are_halved_before_activations_are_computed_again() -> None:
    _, too_large = find(division(8, 1, False), lambda _: False)
    assert too_large == [
        division(8, 1, False),
        division(4, 2, False),
        division(2, 4, False),
        division(1, 8, False),
        division(1, 8, True),
    ]


def test_the_first_that_fits_is_taken() -> None:
    start = division(8, 1, True)
    assert find(start, lambda _: True) == (start, [])
    found, too_large = find(start, lambda each: each.per_device_train_batch_size <= 2)
    assert found == division(2, 4, True)
    assert too_large == [start, division(4, 2, True)]


def test_the_longest_rows_are_tried() -> None:
    assert largest([5, 9, 1, 9, 7], 3) == [1, 3, 4]
    assert largest([5, 9], 3) == [1, 0]


def test_blocks_are_compiled_no_more_where_activations_have_to_be_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released: list[Any] = []

    def fits(_model: Any, _make: Any, _engine: Any, division: Division) -> bool:
        return division.gradient_checkpointing

    monkeypatch.setattr(fitting, "fits", fits)
    monkeypatch.setattr(fitting, "release_blocks", released.append)
    sets = ["train.fit=on", "train.torch_compile=true", "train.gradient_checkpointing=false"]
    text = (ROOT / "specs" / "latex.yaml").read_text()
    spec = load_spec(text, "latex.yaml", sets, environ={}).spec
    nothing: Any = None
    accelerator = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
    found, record = fitted_to_memory(spec, nothing, accelerator, nothing, "model", nothing)
    assert record is not None
    assert released == ["model"]
    assert (found.train.gradient_checkpointing, found.train.torch_compile) == (True, False)

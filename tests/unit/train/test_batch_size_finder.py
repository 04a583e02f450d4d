"""How a batch size is found that fits."""

from types import SimpleNamespace
from typing import Any

import pytest

from job.engines.device import Accelerator
from job.spec.load import load_spec
from job.spec.types import TrainSpec
from job.train import batch_size_finder
from job.train.batch_size_finder import BatchSettings, Trial, find_batch_size, first_that_fits
from tests.jobs import ROOT


def settings(rows: int, accumulation: int, checkpointing: bool) -> BatchSettings:
    return BatchSettings(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 15, 32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_smaller_settings_have_the_rows_of_the_first(rows: int, checkpointing: bool) -> None:
    start = settings(rows, 3, checkpointing)
    found, too_large = first_that_fits(start, lambda _: False)
    assert found is None
    assert too_large[0] == start
    for each in too_large:
        assert each.per_device_train_batch_size * each.gradient_accumulation_steps == rows * 3
    sizes = [each.per_device_train_batch_size for each in too_large]
    assert sizes == sorted(sizes, reverse=True)
    assert too_large[-1] == settings(1, rows * 3, True)


def test_rows_are_halved_before_gradient_checkpointing_is_enabled() -> None:
    _, too_large = first_that_fits(settings(8, 1, False), lambda _: False)
    assert too_large == [
        settings(8, 1, False),
        settings(4, 2, False),
        settings(2, 4, False),
        settings(1, 8, False),
        settings(1, 8, True),
    ]


def test_the_first_settings_that_fit_are_returned() -> None:
    start = settings(8, 1, True)
    assert first_that_fits(start, lambda _: True) == (start, [])
    found, too_large = first_that_fits(start, lambda each: each.per_device_train_batch_size <= 2)
    assert found == settings(2, 4, True)
    assert too_large == [start, settings(4, 2, True)]


@pytest.mark.parametrize("too_large", [[0, 1], [2, 3]], ids=["the images", "the texts"])
def test_a_step_fits_if_both_its_tokens_and_its_images_do(
    too_large: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(_model: Any, make: Any, _engine: Any, settings: BatchSettings) -> bool:
        return sorted(make()["rows"]) != too_large

    monkeypatch.setattr(batch_size_finder, "fits", fits)
    monkeypatch.setattr(batch_size_finder, "to_device", lambda batch, _: batch)
    sets = ["train.fit=on", "train.per_device_train_batch_size=2"]
    text = (ROOT / "specs" / "latex.yaml").read_text()
    spec = load_spec(text, "latex.yaml", sets, environ={}).spec
    rows: Any = SimpleNamespace(lengths=(3, 4, 9, 8), patches=(64, 64, 0, 0), row=int)
    collate: Any = SimpleNamespace(
        batch=lambda picked: {"rows": picked, "counted_tokens": 1, "tokens": 1}
    )
    engine: Any = SimpleNamespace(device="cpu")
    accelerator = Accelerator(kind="cpu", name="test", memory_bytes=2**30)

    def order(train: TrainSpec) -> list[list[int]]:
        width = train.per_device_train_batch_size
        return [list(range(4))[start : start + width] for start in range(0, 4, width)]

    model: Any = None
    trial = Trial(engine=engine, model=model, dataset=rows, collator=collate, planned_batches=order)
    found, _ = find_batch_size(spec, accelerator, trial)
    assert found.train.per_device_train_batch_size == 1


def test_compiled_blocks_are_released_if_gradient_checkpointing_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released: list[Any] = []

    def fits(_model: Any, _make: Any, _engine: Any, settings: BatchSettings) -> bool:
        return settings.gradient_checkpointing

    monkeypatch.setattr(batch_size_finder, "fits", fits)
    sets = ["train.fit=on", "train.torch_compile=true", "train.gradient_checkpointing=false"]
    text = (ROOT / "specs" / "latex.yaml").read_text()
    spec = load_spec(text, "latex.yaml", sets, environ={}).spec
    nothing: Any = None
    rows: Any = SimpleNamespace(lengths=(3, 2), patches=(0, 0))
    accelerator = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
    blocks: Any = SimpleNamespace(release=lambda: released.append("blocks"))
    trial = Trial(
        engine=nothing,
        model=nothing,
        dataset=rows,
        collator=nothing,
        planned_batches=lambda _: [[0, 1]],
        blocks=blocks,
    )
    found, record = find_batch_size(spec, accelerator, trial)
    assert record is not None
    assert released == ["blocks"]
    assert (found.train.gradient_checkpointing, found.train.torch_compile) == (True, False)

"""How the passes of a step are found: the fastest that fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from job.distributed import process_group
from job.engines.device import Accelerator
from job.engines.memory import MemoryEstimate
from job.errors import OutOfMemoryError
from job.spec.load import load_spec
from job.spec.types import JobSpec, TrainSpec
from job.train import batch_size_finder
from job.train import trial as trials
from job.train.batch_size_finder import find_batch_size, first_that_fits
from job.train.pass_candidates import MAX_PASS_ROWS, BatchSettings, candidates
from job.train.trial import Trial
from tests.jobs import ROOT

GPU = Accelerator(kind="cuda", name="test", memory_bytes=2**30)
CPU = replace(GPU, kind="cpu")
LENGTHS = (5, 6, 7, 8, 9, 5, 6, 7)
Way = tuple[int, int, bool]


@cache
def shipped() -> JobSpec:
    text = (ROOT / "specs" / "latex.yaml").read_text()
    return load_spec(text, "latex.yaml", environ={}).spec


def spec_of(rows: int, accumulation: int, **train: Any) -> JobSpec:
    spec = shipped()
    layout = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    given = {"gradient_checkpointing": "auto", "torch_compile": False, **layout, **train}
    return replace(spec, train=replace(spec.train, **given))


def way(settings: BatchSettings | TrainSpec) -> Way:
    return (
        settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps,
        bool(settings.gradient_checkpointing),
    )


def ways(
    spec: JobSpec, tokens_a_row: float = 100, *, on_gpu: bool = True, captured: bool = False
) -> list[Way]:
    def tokens(each: BatchSettings) -> float:
        return tokens_a_row * each.per_device_train_batch_size

    found = candidates(spec.train, tokens, on_gpu=on_gpu, captured=captured)
    return [way(each) for each in found]


@pytest.fixture(autouse=True)
def nothing_to_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial here keeps memory, and collecting garbage takes seconds."""
    monkeypatch.setattr(batch_size_finder, "release_memory", lambda: None)
    monkeypatch.setattr(trials, "release_memory", lambda: None)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """What a trial ran, in order; a test makes trials fail by replacing `trials.fits` again."""
    return limit(monkeypatch, lambda _: True)


def limit(monkeypatch: pytest.MonkeyPatch, fits: Callable[[BatchSettings], bool]) -> list[Way]:
    """Makes trials fit as `fits` says; returns what they run."""
    ran: list[Way] = []

    def trial(_model: Any, _make: Any, _engine: Any, settings: BatchSettings, _: int) -> bool:
        ran.append(way(settings))
        return fits(settings)

    monkeypatch.setattr(trials, "fits", trial)
    return ran


def trial(estimate: Any = lambda *_: None, blocks: Any = None) -> Trial:
    def planned(train: TrainSpec) -> Iterator[list[int]]:
        size = train.per_device_train_batch_size
        return (list(range(8))[start : start + size] for start in range(0, 8, size))

    rows: Any = SimpleNamespace(lengths=LENGTHS, patches=(0,) * 8, row=int)
    engine: Any = SimpleNamespace(device=torch.device("cpu"))
    nothing: Any = None
    return Trial(
        engine=engine,
        model=nothing,
        dataset=rows,
        collator=nothing,
        planned_batches=planned,
        estimate=estimate,
        optim="adamw_torch",
        blocks=blocks,
    )


def memory_of(activations: int) -> MemoryEstimate:
    parts = dict.fromkeys(MemoryEstimate.__dataclass_fields__, 0)
    return MemoryEstimate(**{**parts, "activations": activations})


# --- order -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "accumulation"), [(1, 1), (2, 2), (7, 3), (4, 15), (92, 1)])
@pytest.mark.parametrize("checkpointing", [True, False, "auto"])
def test_every_way_has_the_rows_of_the_step_and_only_the_checkpointing_that_is_allowed(
    rows: int, accumulation: int, checkpointing: Any
) -> None:
    found = ways(spec_of(rows, accumulation, gradient_checkpointing=checkpointing))
    assert {size * passes for size, passes, _ in found} == {rows * accumulation}
    allowed = {True, False} if checkpointing == "auto" else {checkpointing}
    assert {each for _, _, each in found} == allowed
    assert found[0] == (rows * accumulation, 1, checkpointing is True)
    for each in allowed:
        sizes = [size for size, _, kind in found if kind is each]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == 1


def test_small_passes_cost_the_host_so_one_recomputed_pass_comes_before_two_that_are_kept() -> None:
    assert ways(spec_of(2, 2)) == [
        (4, 1, False),
        (4, 1, True),
        (2, 2, False),
        (2, 2, True),
        (1, 4, False),
        (1, 4, True),
    ]


def test_captured_passes_cost_the_host_little_so_two_kept_ones_come_before_a_recomputed_one() -> (
    None
):
    first, two_kept, recomputed = (4, 1, False), (2, 2, False), (4, 1, True)
    assert ways(spec_of(2, 2), tokens_a_row=1000, captured=True)[:2] == [first, two_kept]
    assert ways(spec_of(2, 2), tokens_a_row=1000)[:2] == [first, recomputed]
    # Of few tokens, what a capture costs beside them still counts.
    assert ways(spec_of(2, 2), captured=True)[:2] == [first, recomputed]


def test_large_passes_cost_the_device_so_kept_ones_come_first() -> None:
    assert ways(spec_of(4, 1), tokens_a_row=20_000) == [
        *((4, 1, False), (2, 2, False), (1, 4, False)),
        *((4, 1, True), (2, 2, True), (1, 4, True)),
    ]
    assert ways(spec_of(2, 1), tokens_a_row=1, on_gpu=False)[:2] == [(2, 1, False), (1, 2, False)]


def test_compiled_blocks_exclude_checkpointing_if_the_spec_insists_on_them() -> None:
    assert ways(spec_of(2, 2, torch_compile=True)) == [(4, 1, False), (2, 2, False), (1, 4, False)]
    assert (4, 1, True) in ways(spec_of(2, 2, torch_compile="auto"))


# --- search ----------------------------------------------------------------------------------


def test_the_search_goes_up_to_one_pass_with_its_activations_kept(tried: list[Way]) -> None:
    found, record = find_batch_size(spec_of(2, 2), GPU, trial())
    assert way(found.train) == (4, 1, False)
    assert set(tried) == {(4, 1, False)}
    assert record is not None
    assert (record["too_large"], record["ruled_out"]) == ([], [])


@pytest.mark.parametrize(
    ("checkpointing", "expected"), [("auto", (4, 1, True)), (True, (4, 1, True)), (False, (1, 4))]
)
def test_what_does_not_fit_is_followed_by_the_next_fastest_way(
    checkpointing: Any, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, lambda s: s.gradient_checkpointing or s.per_device_train_batch_size == 1)
    spec = spec_of(2, 2, gradient_checkpointing=checkpointing)
    found, record = find_batch_size(spec, GPU, trial())
    assert way(found.train)[: len(expected)] == expected
    assert found.train.gradient_checkpointing is (checkpointing is not False)
    assert record is not None
    assert len(record["too_large"]) == {"auto": 1, True: 0, False: 2}[checkpointing]


def test_ways_that_the_estimate_rules_out_are_not_tried(tried: list[Way]) -> None:
    def estimate(train: TrainSpec, rows: Sequence[int]) -> MemoryEstimate:
        return memory_of(0 if train.gradient_checkpointing else len(rows) * 2**30)

    found, record = find_batch_size(spec_of(2, 2), GPU, trial(estimate))
    assert way(found.train) == (4, 1, True)
    assert set(tried) == {(4, 1, True)}
    assert record is not None
    assert [each["per_device_train_batch_size"] for each in record["ruled_out"]] == [4]


def test_the_last_way_is_tried_whatever_the_estimate_says(tried: list[Way]) -> None:
    found, _ = find_batch_size(spec_of(2, 2), GPU, trial(lambda *_: memory_of(2**50)))
    assert way(found.train) == (1, 4, True)
    assert set(tried) == {(1, 4, True)}


@pytest.mark.parametrize("margin", [0.65, 0.75])
def test_the_estimate_rules_out_only_by_a_wide_margin(margin: float, tried: list[Way]) -> None:
    found, _ = find_batch_size(
        spec_of(1, 2, gradient_checkpointing=False),
        GPU,
        trial(lambda _, rows: memory_of(int(len(rows) * 2**29 / margin))),
    )
    assert way(found.train) == ((1, 2, False) if margin < 0.7 else (2, 1, False))


@pytest.mark.parametrize(
    ("train", "fix"),
    [
        ({"gradient_checkpointing": False}, "set train.gradient_checkpointing: auto"),
        ({"torch_compile": True}, "set train.torch_compile: auto"),
        ({}, "lower data.max_pixels or train.max_length"),
    ],
)
def test_an_error_lists_what_was_tried_and_what_the_spec_excluded(
    train: dict[str, Any], fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, lambda _: False)
    with pytest.raises(OutOfMemoryError, match="tried 4 × 1, without gradient") as refused:
        find_batch_size(spec_of(2, 2, **train), GPU, trial())
    assert fix in str(refused.value.problems[0].fix)


def test_no_pass_has_more_rows_than_a_micro_batch_of_the_spec_can_have() -> None:
    train = spec_of(65_536, 65_536).train
    every = candidates(train, lambda _: 100, on_gpu=True, captured=False)
    assert max(each.per_device_train_batch_size for each in every) == MAX_PASS_ROWS == 65_536
    assert {each.rows for each in every} == {65_536**2}


def test_a_way_has_to_fit_on_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    other = iter([True, False])  # another process's failures
    monkeypatch.setattr(process_group, "any_rank", lambda flag: flag or next(other))
    every = candidates(spec_of(2, 2).train, lambda _: 100, on_gpu=True, captured=False)
    assert first_that_fits(every, lambda _: True) == (every[1], [every[0]])


@pytest.mark.parametrize("too_large", [[0, 1], [2, 3]], ids=["the images", "the texts"])
def test_a_step_fits_if_both_its_tokens_and_its_images_do(
    too_large: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(_model: Any, make: Any, *_: Any) -> bool:
        return sorted(make()["rows"]) != too_large

    monkeypatch.setattr(trials, "fits", fits)
    monkeypatch.setattr(trials, "to_device", lambda batch, _: batch)
    collate: Any = SimpleNamespace(
        batch=lambda picked: {"rows": picked, "counted_tokens": 1, "tokens": 1}
    )
    rows: Any = SimpleNamespace(lengths=(3, 4, 9, 8), patches=(64, 64, 0, 0), row=int)
    tries = trial()
    tries.dataset, tries.collator = rows, collate
    tries.planned_batches = lambda train: (
        [[0, 1], [2, 3]] if train.per_device_train_batch_size == 2 else [[0], [1], [2], [3]]
    )
    found, _ = find_batch_size(spec_of(2, 1, gradient_checkpointing=False), GPU, tries)
    assert found.train.per_device_train_batch_size == 1


# --- without a search ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "train", "estimate", "expected"),
    [
        (CPU, {}, memory_of(2**29), (2, 2, False)),
        (CPU, {}, memory_of(2**30), (2, 2, True)),
        (CPU, {}, None, (2, 2, True)),
        (GPU, {"fit": "off"}, memory_of(2**29), (2, 2, False)),
        (CPU, {"gradient_checkpointing": False}, None, (2, 2, False)),
        (CPU, {"gradient_checkpointing": True}, memory_of(1), (2, 2, True)),
        (CPU, {"torch_compile": True}, None, (2, 2, False)),
    ],
)
def test_without_a_search_passes_are_the_spec_s_and_kept_only_if_the_estimate_leaves_ample_room(
    accelerator: Accelerator,
    train: dict[str, Any],
    estimate: MemoryEstimate | None,
    expected: Way,
    tried: list[Way],
) -> None:
    spec = spec_of(2, 2, **train)
    found, record = find_batch_size(spec, accelerator, trial(lambda *_: estimate))
    assert way(found.train) == expected
    assert (record, tried) == (None, [])


def test_sharded_steps_are_checkpointed_if_the_spec_leaves_it_open() -> None:
    spec = spec_of(2, 2)
    sharded = replace(spec, runtime=replace(spec.runtime, distributed="fsdp2"))
    found, _ = find_batch_size(sharded, GPU, trial(lambda *_: memory_of(1)))
    assert way(found.train) == (2, 2, True)


# --- compiled blocks -------------------------------------------------------------------------


class Blocks:
    def __init__(self) -> None:
        self.released = 0

    def release(self) -> None:
        self.released += 1


def test_compiled_blocks_are_released_if_gradient_checkpointing_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit(monkeypatch, lambda settings: settings.gradient_checkpointing)
    blocks = Blocks()
    found, _ = find_batch_size(spec_of(2, 2, torch_compile="auto"), GPU, trial(blocks=blocks))
    assert blocks.released == 1
    assert (found.train.gradient_checkpointing, found.train.torch_compile) == (True, False)


@pytest.mark.parametrize("wanted", ["auto", True])
def test_blocks_that_do_not_compile_end_a_job_only_if_the_spec_insists_on_them(
    wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Blocks()

    def fits(*_: Any) -> bool:
        if not blocks.released:
            raise TorchDynamoException("a kernel does not compile")
        return True

    monkeypatch.setattr(trials, "fits", fits)
    spec = spec_of(2, 2, torch_compile=wanted)
    if wanted is True:
        with pytest.raises(TorchDynamoException):
            find_batch_size(spec, GPU, trial(blocks=blocks))
        return
    found, _ = find_batch_size(spec, GPU, trial(blocks=blocks))
    assert way(found.train) == (4, 1, False)
    assert found.train.torch_compile is False


@pytest.mark.parametrize("wanted", ["auto", True])
def test_blocks_that_fit_stay_compiled(wanted: Any, tried: list[Way]) -> None:
    blocks = Blocks()
    found, _ = find_batch_size(spec_of(2, 2, torch_compile=wanted), GPU, trial(blocks=blocks))
    assert found.train.torch_compile is True
    assert (blocks.released, set(tried)) == (0, {(4, 1, False)})

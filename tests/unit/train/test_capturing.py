"""Captured passes: the buckets, and a training whose passes run on fixed tensors.

On a CPU, "capturing" only notes the work, which then runs eagerly on the same fixed inputs and
gradients; tests/gpu has the same tests with graphs.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks.training import UNVALIDATED, formula_rows, tiny_family, train_stage
from job.engines.captured_steps import CapturedSteps, CaptureFailed, Work
from job.engines.device import detect
from job.families.ernie45_vl.packed.padding import bucket
from job.families.packed_shape import PackedShape
from job.spec.load import load_spec
from job.spec.types import JobSpec
from job.train import train as train_module
from job.train.buckets import CAPTURE_TOKENS, MAX_BUCKETS, choose_buckets
from job.train.capturing import capture_training
from tests.jobs import start

SETTINGS = (
    *UNVALIDATED,
    "runtime.accelerator=cpu",
    "train.max_steps=4",
    "train.per_device_train_batch_size=2",
    "train.gradient_accumulation_steps=2",
    "train.learning_rate=1e-3",
    "train.warmup_steps=0",
    "train.logging_steps=1",
    "train.gradient_checkpointing=false",
    "train.dataloader_num_workers=0",
    "train.torch_compile=false",
    "lora.finetune_experts=true",
)


def spec_with(*more: str) -> JobSpec:
    path = Path("specs/latex.yaml")
    return load_spec(path.read_text(), str(path), [*SETTINGS, *more], environ={}).spec


def trained(spec: JobSpec) -> tuple[Any, list[float], list[float], dict[str, torch.Tensor]]:
    """The result, the losses and gradient norms by step, and the trained weights."""
    family = tiny_family(spec)
    model = family.initialize(seed=0, dtype=torch.float32, device=torch.device("cpu"))
    rows = list(formula_rows(16))
    result, adapted, history = train_stage(spec, detect(spec.runtime), family, model, rows)
    steps = [entry for entry in history if "loss" in entry]
    weights = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" in n}
    return result, [s["loss"] for s in steps], [s["grad_norm"] for s in steps], weights


def noted(work: Work) -> Work:
    """Captures nothing: the same work runs again."""
    return work


def no_eager_pass(*_: object) -> Any:
    raise AssertionError("a planned batch has no graph")


@pytest.mark.parametrize("recomputed", ["false", "true"])
def test_a_training_on_fixed_tensors_equals_the_eager_one(
    recomputed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_with(f"train.gradient_checkpointing={recomputed}")
    result, losses, norms, weights = trained(spec)
    assert result.captured is None
    assert len(set(losses)) == len(losses) == 4
    monkeypatch.setattr(
        train_module, "capture_training", functools.partial(capture_training, capture=noted)
    )
    monkeypatch.setattr("job.train.buckets.CAPTURE_TOKENS", 20)  # several buckets
    monkeypatch.setattr(CapturedSteps, "_eagerly", no_eager_pass)
    captured, captured_losses, captured_norms, captured_weights = trained(spec)
    assert captured.captured["graphs"] > 1
    assert captured_losses == pytest.approx(losses, abs=1e-5)
    assert captured_norms == pytest.approx(norms, rel=1e-3)
    assert captured_weights.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(captured_weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_a_capture_that_fails_leaves_the_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(work: Work) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    spec = spec_with()
    _, losses, norms, _ = trained(spec)
    monkeypatch.setattr(
        train_module, "capture_training", functools.partial(capture_training, capture=failing)
    )
    result, after, after_norms, _ = trained(spec)
    assert result.captured is None
    assert (after, after_norms) == (losses, norms)


def test_the_reason_of_a_failed_capture_is_its_first_line() -> None:
    class Failing(torch.nn.Module):
        def forward(self, **_: object) -> None:
            raise RuntimeError("first\nsecond")

    with pytest.raises(CaptureFailed, match=r"^first$"):
        CapturedSteps(Failing(), [{"input_ids": torch.ones(1)}], capture=noted)


def test_parameters_that_only_images_reach_stay_as_they_are_in_steps_without_images() -> None:
    def trained(*, captured: bool) -> list[torch.Tensor]:
        model = TextAndImages()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        with_image = {"input_ids": torch.ones(3), "pixels": torch.full((3,), 2.0)}
        # Padded to the bucket, a batch without images has pixels that add nothing.
        without = {"input_ids": torch.ones(3), "pixels": torch.zeros(3)}
        steps = None
        if captured:
            alone = {"input_ids": torch.ones(3)}
            steps = CapturedSteps(model, [with_image], without_images=alone, capture=noted)
        for batch, images in ((with_image, 1), (without, 0), (without, 0)):
            if steps is not None:
                steps.forward_backward(cast(Any, {**batch, "bucket": 0}), 1.0)
                steps.finish_step(images)
            else:
                model(batch["input_ids"], batch["pixels"] if images else None).loss.backward()
            optimizer.step()
            if steps is not None:
                steps.zero()
            else:
                optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    for eager, captured in zip(trained(captured=False), trained(captured=True), strict=True):
        assert torch.equal(eager, captured)


# --- buckets -----------------------------------------------------------------------------------


def shape(tokens: int, images: int = 4) -> PackedShape:
    patches = 16 * images
    vision = patches // 4 + 2 * images
    return PackedShape(
        rows=4,
        text=tokens - vision,
        vision=vision,
        supervised=tokens // 3,
        longest=tokens // 3,
        images=images,
        patches=patches,
        largest_image=16,
    )


cover: Callable[[Sequence[PackedShape]], PackedShape] = functools.partial(bucket, merged_patches=4)


def test_a_short_training_has_one_bucket_and_a_long_one_several() -> None:
    sizes = [200 + 10 * n for n in range(60)]
    few = choose_buckets(map(shape, sizes), cover)
    many = choose_buckets(map(shape, sizes * 100), cover)
    assert len(few.shapes) == 1
    assert 1 < len(many.shapes) <= MAX_BUCKETS
    assert many.padding < few.padding


def test_no_batch_takes_the_place_of_the_padding() -> None:
    lengths = [int(60 * 1.02**n) for n in range(150)]
    shapes = [shape(length, images=0) for length in lengths for _ in range(40)]
    buckets = choose_buckets(shapes, cover)
    assert len(buckets.shapes) > 1
    for each in {*shapes}:
        bucket_of_it = buckets.shapes[buckets.of(each) or 0]
        assert each.text < bucket_of_it.text
        assert each.rows < bucket_of_it.rows
    full = shape(80, images=3)
    room = full._replace(text=full.text + 8, rows=full.rows + 1)
    assert full.fits(room)
    for lacking in (full, room._replace(rows=full.rows), room._replace(text=full.text)):
        assert not full.fits(lacking)
    assert not full.fits(room._replace(patches=full.patches + 4))
    # One more row has room for as many tokens as the longest one has.
    assert full.fits(room._replace(text=full.text + full.longest))
    assert not full.fits(room._replace(text=full.text + full.longest + 1))
    assert full.fits(room._replace(text=full.text + 2 * full.longest, rows=full.rows + 2))


@pytest.mark.parametrize("repeats", [1, 30])
def test_every_batch_fits_and_has_the_smallest_bucket(repeats: int) -> None:
    shapes = [shape(150 + (37 * n) % 900, images=1 + n % 7) for n in range(200)] * repeats
    buckets = choose_buckets(shapes, cover)
    for each in shapes:
        number = buckets.of(each)
        assert number is not None
        assert not any(each.fits(smaller) for smaller in buckets.shapes[number + 1 :])
    tokens = [each.tokens for each in buckets.shapes]
    assert tokens == sorted(tokens, reverse=True)


def test_the_division_costs_no_more_than_any_other_with_one_cut() -> None:
    shapes = sorted((shape(150 + (91 * n) % 700) for n in range(3_000)), key=lambda s: s.tokens)

    def cost(parts: list[list[PackedShape]]) -> int:
        return sum(CAPTURE_TOKENS + len(part) * cover(part).tokens for part in parts)

    buckets = choose_buckets(shapes, cover)
    chosen = sum(buckets.shapes[buckets.of(each) or 0].tokens for each in shapes)
    chosen += CAPTURE_TOKENS * len(buckets.shapes)
    assert chosen <= cost([shapes])
    assert all(chosen <= 1.02 * cost([shapes[:n], shapes[n:]]) for n in range(100, 3_000, 100))


def test_batches_are_divided_by_text_and_by_images() -> None:
    def batch(text: int, images: int) -> PackedShape:
        return shape(text + 6 * images, images)

    shapes = [batch(150 + 7 * n % 350, images=10 + 11 * n % 50) for n in range(4_000)]
    ordered = sorted(shapes, key=lambda each: each.tokens)
    buckets = choose_buckets(shapes, cover)
    size = -(-len(ordered) // len(buckets.shapes))
    by_tokens = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    computed = sum(cover(part).tokens * len(part) for part in by_tokens)
    assert 1 < len(by_tokens) <= len(buckets.shapes)
    assert buckets.padding < 0.7 * (1 - sum(each.tokens for each in shapes) / computed)


def test_a_batch_whose_padding_would_be_longer_than_any_row_is_in_no_bucket() -> None:
    buckets = choose_buckets([shape(900), shape(880)], cover)
    longest = buckets.shapes[0].longest
    assert buckets.of(shape(buckets.shapes[0].tokens - longest)) == 0
    assert buckets.of(shape(buckets.shapes[0].tokens - longest - 1)) is None


def test_a_batch_larger_than_all_buckets_is_not_padded() -> None:
    buckets = choose_buckets([shape(300)], cover)
    assert buckets.of(shape(301 + 8)) is None
    assert buckets.of(shape(200)._replace(rows=99)) is None


# --- several processes -------------------------------------------------------------------------

PAIR = """
import json, sys
import torch
import torch.distributed as dist
from tests.unit.train.test_capturing import TextAndImages, noted
from job.engines.captured_steps import CapturedSteps

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = TextAndImages()
text, image = {"input_ids": torch.ones(3)}, {"input_ids": torch.ones(3), "pixels": torch.ones(3)}
# Only rank 0 has batches with images.
steps = CapturedSteps(
    model, [text if rank else image], without_images=text if rank else None, capture=noted
)
found = []
for images in (1, 0):
    steps.forward_backward({**(text if rank else image), "bucket": 0}, 2.0 if rank else 4.0)
    steps.finish_step(images)
    found.append([None if p.grad is None else p.grad.tolist() for p in model.parameters()])
    steps.zero()
dist.barrier()
dist.destroy_process_group()
print(json.dumps(found))
"""


class TextAndImages(torch.nn.Module):
    """A weight that text reaches, and one that only images reach."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.vision = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor | None = None) -> Any:
        loss = (self.text * input_ids).sum()
        if pixels is not None:
            loss = loss + (self.vision * pixels).sum()
        return SimpleNamespace(loss=loss)


def test_processes_average_the_gradients_of_all_parameters_that_any_of_them_reaches(
    tmp_path: Path,
) -> None:
    pair = [start(str(rank), str(tmp_path / "store"), code=PAIR) for rank in range(2)]
    found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in pair]
    average, of_one = [3.0] * 3, [2.0] * 3  # of 4 and 2, and of 4 and none
    assert found == [[[average, of_one], [average, None]]] * 2

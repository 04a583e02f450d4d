"""How many answers are generated at once, and what happens if they do not fit."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from job import families
from job.evaluation import rows_at_once as limits
from job.evaluation.generate import generate, generate_all, generate_answers, stream_answer
from job.evaluation.rows_at_once import cache_bytes, rows_at_once
from job.families.batches import to_device
from job.families.encoded import IGNORED, Encoded
from job.families.ernie45_vl import Ernie45VL
from job.families.held_out_loss import held_out_loss
from job.families.lookahead import computed_ahead
from job.prep.rows import Message, Part, Row
from tests.unit.families.test_decoder import GREEDY, NEW_TOKENS, SPEC, TINY, prompts, questions


@pytest.fixture(scope="module")
def family() -> Ernie45VL:
    return Ernie45VL.bind(families.read_checkpoint("builtin://ernie-vl-tiny", TINY), SPEC.data)


@pytest.fixture(scope="module")
def model(family: Ernie45VL) -> Any:
    return family.load(dtype=torch.float32, device=torch.device("cpu")).eval()


def held_out_rows() -> list[Row]:
    """Rows with images, one without, and answers of different lengths."""
    return [
        Row(
            id=question.id,
            messages=(*question.asked, Message(role="assistant", parts=(Part(text="x+" * n),))),
            images=question.images,
        )
        for n, question in enumerate(questions(), start=1)
    ]


def test_answers_at_once_are_bounded_by_memory_prompts_and_the_spec(
    family: Ernie45VL, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(family)

    def chosen(memory: float, requested: Any = "auto", prompts: list[Encoded] = 20 * asked) -> int:
        monkeypatch.setattr(limits, "free_memory", lambda _: int(memory))
        return rows_at_once(model, prompts, requested, new_tokens=NEW_TOKENS, by_decoder=True)

    assert cache_bytes(model) == 2 * 4 * 2 * 128 * 4  # keys and values, layers, heads, size, fp32
    assert chosen(2**40) == limits.MOST_ON_CPU
    assert chosen(2**40, 500) == 20 * len(asked)
    assert chosen(2**40, 3) == 3
    assert chosen(2**40, "auto", asked) == len(asked)
    assert 1 < chosen(0.45 * 2**30) < limits.MOST_ON_CPU
    assert chosen(0) == 1


def test_answers_that_do_not_fit_are_generated_fewer_at_a_time(
    family: Ernie45VL, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_all(model, family, questions(), GREEDY, batch_size="auto")
    decoder, tried = family.decoder, list[int]()

    def small(model: Any, *, slots: int, capacity: int) -> Any:
        tried.append(slots)
        if slots > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decoder(model, slots=slots, capacity=capacity)

    monkeypatch.setattr(family, "decoder", small)
    ended: list[int] = []
    found = generate_all(model, family, questions(), GREEDY, batch_size="auto", ended=ended.append)
    assert (found, tried, sum(ended)) == (expected, [8, 4, 2], len(expected))


def test_one_row_that_does_not_fit_ends_the_job(
    family: Ernie45VL, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(family, "decoder", none)
    with pytest.raises(torch.OutOfMemoryError):
        generate_all(model, family, questions(), GREEDY, batch_size=2)


class Recorded:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.ended = False

    def put(self, tokens: torch.Tensor) -> None:
        self.calls.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamed_answer_comes_token_by_token_and_is_that_of_transformers(
    family: Ernie45VL, model: Any
) -> None:
    prompt, streamer = prompts(family)[0], Recorded()
    answer = stream_answer(model, family, prompt, GREEDY, streamer)
    assert answer == generate(model, family, [prompt], GREEDY)[0]
    assert streamer.calls == [[*prompt.input_ids], *([token] for token in answer)]
    assert streamer.ended


@pytest.mark.parametrize("tokens", [0, 400])
def test_the_loss_of_packed_rows_is_that_of_padded_ones(
    family: Ernie45VL, model: Any, tokens: int
) -> None:
    encoded = [family.encode(row) for row in held_out_rows()]
    assert family.try_packed_step(model)
    nll, supervised = held_out_loss(model, family, encoded, rows=2, tokens=tokens)
    batch: Any = to_device(family.collate(encoded), torch.device("cpu"))
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1]
    expected = cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED], reduction="sum")
    assert supervised == int((labels != IGNORED).sum())
    assert math.isclose(nll, float(expected), rel_tol=1e-5)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("threads", [0, 3])
def test_items_computed_ahead_keep_their_order_and_their_errors(threads: int) -> None:
    def inverse(number: int) -> float:
        return 1 / number

    items = computed_ahead(inverse, [4, 2, 1, 0, 5], threads=threads)
    assert [next(items) for _ in range(3)] == [0.25, 0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_generated_answers_have_the_loss_of_their_labels(family: Ernie45VL, model: Any) -> None:
    rows = held_out_rows()[:3]
    found = generate_answers(
        model, family, questions()[:3], rows, GREEDY, batch_size="auto", label="test"
    )
    nll, supervised = held_out_loss(
        model, family, [family.encode(row) for row in rows], rows=1, tokens=0
    )
    assert math.isclose(found.loss, nll / supervised, rel_tol=1e-5)
    assert len(found.texts) == 3

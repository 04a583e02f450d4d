"""Decoding of many prompts: a row that ends makes room for the next prompt."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from job.families.base import Decoder
from job.families.encoded import Encoded

if TYPE_CHECKING:
    import torch


READ_EVERY_ON_GPU = 8
"""Steps between two looks at the generated tokens, because each look waits for the GPU."""


def decode_prompts(
    decoder: Decoder,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    read_every: int,
    ended: Callable[[int], object] | None = None,
    streamed: Callable[[int, Sequence[int]], object] | None = None,
    stop: Callable[[], bool] | None = None,
    draw: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
    keep_end: bool = False,
) -> list[list[int]]:
    """The tokens after each prompt, up to its end token, which is left out unless `keep_end`.

    They are the most likely ones, or what `draw` chooses: tokens (B,) by their logits (B, V).

    Tokens are read from the device every `read_every` steps: reading waits for the device, and a
    row that has ended is decoded until then. `ended` is called with the number of answers that were
    completed, `streamed` with the number of a prompt and the tokens that were added to its answer.
    If `stop` becomes true, the answers end there.
    """
    import torch

    answers: list[list[int]] = [[] for _ in prompts]
    # Long prompts first: those that need the most memory fail at once, or not at all.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i].input_ids)))
    rows: list[int] = []  # the number of each decoded row's prompt

    def read(steps: "torch.Tensor") -> None:
        """Adds the tokens (steps, rows) of the last rows to their answers; drops ended rows."""
        first = len(rows) - steps.shape[1]
        before = len(rows)
        for row, column in reversed(list(enumerate(steps.t().tolist(), start=first))):
            answer = answers[rows[row]]
            length = len(answer)
            has_ended = _extend(answer, column, max_new_tokens, end_tokens, keep_end=keep_end)
            if streamed is not None:
                streamed(rows[row], answer[length:])
            if has_ended:
                decoder.drop(row)
                last = rows.pop()
                if row < len(rows):
                    rows[row] = last
        if ended is not None:
            ended(before - len(rows))

    with torch.inference_mode():
        while (waiting or rows) and not (stop is not None and stop()):
            free = decoder.slots - len(rows)
            if waiting and (not rows or 4 * free >= decoder.slots):
                group = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                logits = decoder.prefill([prompts[number] for number in group])  # (N, V)
                rows += group
                added = decoder.tokens[-len(group) :]
                if draw is not None:
                    added.copy_(draw(logits))
                read(added[None])
                continue
            steps = []
            for _ in range(read_every):
                logits = decoder.step()  # (B, V)
                if draw is not None:
                    decoder.tokens.copy_(draw(logits))
                steps.append(decoder.tokens.clone())
            read(torch.stack(steps))
    return answers


def _extend(
    answer: list[int],
    tokens: Sequence[int],
    limit: int,
    end_tokens: Collection[int],
    *,
    keep_end: bool,
) -> bool:
    """Adds tokens up to an end token or the limit; returns whether the answer has ended."""
    for token in tokens:
        ends = token in end_tokens
        if keep_end or not ends:
            answer.append(token)
        if ends or len(answer) == limit:
            return True
    return False

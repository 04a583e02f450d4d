"""How evenly the rows of a step fill its forward passes, beside the plain order in the same run.

    python -m benchmarks.passes

Rows have the sizes of real formulas (benchmarks/im2latex_sizes.json). `largest_over_mean` is the
tokens of a step's largest pass by the mean over its passes: of passes that wait for each other, as
of processes that do, the time lost is this less 1. `padding` is the share of a padded pass, and
`attention_padding` that of the grid in which a packed pass computes attention, that holds no token.
"""

import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from benchmarks import record
from benchmarks.training import SPEC, formula_rows
from job import families
from job.families import model_source
from job.families.ernie45_vl import Ernie45VL
from job.spec.load import load_spec
from job.train.micro_batches import Cut, alike, balanced, in_order
from job.train.sampler import SPARE, SharedBatches, shuffled

ROWS, EPOCHS, SEED = 256, 20, 3407


@dataclass(frozen=True, kw_only=True)
class Division:
    """How the rows of a step are divided: rows a pass, passes, processes."""

    width: int
    passes: int
    processes: int


DIVISIONS = (
    Division(width=2, passes=2, processes=1),
    Division(width=2, passes=8, processes=1),
    Division(width=8, passes=4, processes=1),
    Division(width=2, passes=2, processes=8),
    Division(width=8, passes=1, processes=8),
)


def main() -> None:
    spec = load_spec(SPEC.read_text(), str(SPEC), environ={}).spec
    tiny = families.read_checkpoint(
        "builtin://ernie-vl-tiny", model_source.MODELS / "ernie-vl-tiny"
    )
    family = Ernie45VL.bind(tiny, spec.data)
    sizes = [family.row_size(family.encode(row)) for row in formula_rows(ROWS)]
    lengths, patches = [size.tokens for size in sizes], [sum(size.patches) for size in sizes]
    runs = [_measure(division, lengths, patches) for division in DIVISIONS]
    measured = {
        "rows": ROWS,
        "epochs": EPOCHS,
        "tokens_a_row": {
            "min": min(lengths),
            "median": statistics.median(lengths),
            "max": max(lengths),
        },
        "divisions": runs,
    }
    device = f"{platform.machine()}, no model is computed"
    record.write("passes", "benchmarks.passes", device, measured, ("transformers", "accelerate"))


def _measure(
    division: Division, lengths: Sequence[int], patches: Sequence[int]
) -> dict[str, object]:
    plain, width = in_order(division.width), division.width
    cuts = {"plain": plain, "grouped": balanced(width, lengths, patches)}
    packed = {name: _figures(division, lengths, cut) for name, cut in cuts.items()}
    padded = {
        "plain": packed["plain"]["attention_padding"],
        "grouped": _figures(division, lengths, alike(width, lengths))["attention_padding"],
    }
    return {
        "per_device_train_batch_size": width,
        "gradient_accumulation_steps": division.passes,
        "processes": division.processes,
        "packed": packed,
        "padding": padded,
    }


def _figures(division: Division, lengths: Sequence[int], cut: Cut) -> dict[str, float]:
    largest, over_mean, tokens, grid = 0, [], 0, 0
    for step in _steps(division, len(lengths), cut):
        passes = [[lengths[row] for row in batch if row != SPARE] or [0] for batch in step]
        sums = [sum(own) for own in passes]
        over_mean.append(max(sums) / statistics.mean(sums))
        largest = max(largest, *sums)
        tokens += sum(sums)
        grid += sum(len(own) * max(own) for own in passes)
    return {
        "largest_over_mean": round(statistics.mean(over_mean), 3),
        "largest_pass_tokens": largest,
        "attention_padding": round(1 - tokens / grid, 3),
    }


def _steps(division: Division, rows: int, cut: Cut) -> Iterator[list[list[int]]]:
    """The batches of every step, over all passes and processes."""
    every = [
        SharedBatches(
            shuffled(rows, SEED),
            division.width,
            passes=division.passes,
            process=process,
            processes=division.processes,
            cut=cut,
        )
        for process in range(division.processes)
    ]
    at_once = division.passes * division.processes
    for epoch in range(EPOCHS):
        for batches in every:
            batches.sampler.set_epoch(epoch)
        together = list(chain.from_iterable(zip(*every, strict=True)))
        yield from (together[i : i + at_once] for i in range(0, len(together), at_once))


if __name__ == "__main__":
    main()

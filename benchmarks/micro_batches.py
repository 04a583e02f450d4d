"""Measures how evenly the rows of a step fill its micro-batches, compared with the plain order.

    python -m benchmarks.micro_batches

Rows have the sizes of real formulas (benchmarks/im2latex_sizes.json). `largest_over_mean` is the
number of tokens in a step's largest micro-batch, divided by the mean; minus 1, it is the share of
time that processes lose waiting for each other. `padding` is the share of padding in a padded
micro-batch, and `attention_padding` that in the grid in which a packed one computes attention.
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
from job.train.micro_batches import Split, balanced, in_order, sorted_by_length
from job.train.sampler import DUMMY_ROW, DistributedBatchSampler, shuffled

ROWS, EPOCHS, SEED = 256, 20, 3407


@dataclass(frozen=True, kw_only=True)
class Division:
    """How the rows of a step are divided."""

    size: int
    """Rows of a micro-batch."""
    micro_batches: int
    processes: int


DIVISIONS = (
    Division(size=2, micro_batches=2, processes=1),
    Division(size=2, micro_batches=8, processes=1),
    Division(size=8, micro_batches=4, processes=1),
    Division(size=2, micro_batches=2, processes=8),
    Division(size=8, micro_batches=1, processes=8),
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
    record.write(
        "passes", "benchmarks.micro_batches", device, measured, ("transformers", "accelerate")
    )


def _measure(
    division: Division, lengths: Sequence[int], patches: Sequence[int]
) -> dict[str, object]:
    plain, size = in_order(division.size), division.size
    splits = {"plain": plain, "grouped": balanced(size, lengths, patches)}
    packed = {name: _figures(division, lengths, split) for name, split in splits.items()}
    padded = {
        "plain": packed["plain"]["attention_padding"],
        "grouped": _figures(division, lengths, sorted_by_length(size, lengths))[
            "attention_padding"
        ],
    }
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": division.micro_batches,
        "processes": division.processes,
        "packed": packed,
        "padding": padded,
    }


def _figures(division: Division, lengths: Sequence[int], split: Split) -> dict[str, float]:
    largest, over_mean, tokens, grid = 0, [], 0, 0
    for step in _steps(division, len(lengths), split):
        micro_batches = [
            [lengths[row] for row in batch if row != DUMMY_ROW] or [0] for batch in step
        ]
        sums = [sum(batch) for batch in micro_batches]
        over_mean.append(max(sums) / statistics.mean(sums))
        largest = max(largest, *sums)
        tokens += sum(sums)
        grid += sum(len(batch) * max(batch) for batch in micro_batches)
    return {
        "largest_over_mean": round(statistics.mean(over_mean), 3),
        "largest_pass_tokens": largest,
        "attention_padding": round(1 - tokens / grid, 3),
    }


def _steps(division: Division, rows: int, split: Split) -> Iterator[list[list[int]]]:
    """The micro-batches of every step, over all processes."""
    samplers = [
        DistributedBatchSampler(
            shuffled(rows, SEED),
            division.size,
            micro_batches=division.micro_batches,
            rank=process,
            processes=division.processes,
            split=split,
        )
        for process in range(division.processes)
    ]
    at_once = division.micro_batches * division.processes
    for epoch in range(EPOCHS):
        for batches in samplers:
            batches.sampler.set_epoch(epoch)
        together = list(chain.from_iterable(zip(*samplers, strict=True)))
        yield from (together[i : i + at_once] for i in range(0, len(together), at_once))


if __name__ == "__main__":
    main()

"""The data section of a plan: rows counted from headers, tokens estimated from a sample."""

from collections.abc import Sequence
from dataclasses import dataclass

from job.errors import InputError, JobError
from job.evaluation import answer_kinds, answer_lengths
from job.families.base import Family
from job.families.encoded import RowSize
from job.pipeline.context import RunContext
from job.planning import facts
from job.planning.sample import Sample, sample_source
from job.prep import chunks, control_tokens, mixture, sources
from job.prep.convert import to_results
from job.prep.rows import Row
from job.prep.shards import BYTES_BESIDE_IMAGES
from job.prep.source_check import check_source
from job.prep.split_counts import SplitCounts, count_splits
from job.prep.splits import split_of_source, takes_fractions
from job.prep.streaming import max_full_shards
from job.spec.types import DataSpec, JobSpec

SPLIT_ROWS, SPLIT_BYTES = 200, 256 * 2**20
"""With more rows in all, or more bytes of images, a plan does not read them all to count those of
each split; `job init` reads as many rows."""


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Rows of the sources, before held-out rows are split off."""

    train: Sequence[int]
    """Of each training source."""
    held_out: int | None
    """Of the evaluation source; None without one."""
    validation: int | None
    """Of the validation source; None without one."""
    exact: bool
    """Whether all rows were counted rather than estimated."""

    @property
    def total(self) -> int:
        return sum(self.train) + (self.held_out or 0) + (self.validation or 0)


@dataclass(frozen=True, kw_only=True)
class DataSurvey:
    """What could be found out about the data, and the errors that prevented the rest."""

    counts: RowCounts | None
    samples: tuple[Sample, ...] | None
    """Of each training source."""
    splits: SplitCounts | None
    """The rows of each split as prep will count them; None if they are too many to read."""
    unknown: JobError | None
    missing: InputError | None

    @property
    def sizes(self) -> tuple[RowSize, ...]:
        """The sizes of all sampled rows that can be trained on."""
        return tuple(size for sample in self.samples or () for size in sample.sizes)


def count_rows(stages: RunContext) -> RowCounts:
    specs = stages.spec.data.sources()
    counted = {
        path: sources.estimate_count(source, specs[path])
        for path, source in stages.inputs.sources.items()
    }
    rows = {path: count for path, (count, _) in counted.items()}
    return RowCounts(
        train=[count for path, count in rows.items() if split_of_source(path) == "train"],
        held_out=rows.get("$.data.eval"),
        validation=rows.get("$.data.validation"),
        exact=all(exact for _, exact in counted.values()),
    )


def split_rows(
    stages: RunContext, counts: RowCounts, samples: Sequence[Sample]
) -> SplitCounts | None:
    """The splits of all rows, read as prep reads them; None if there are more than `SPLIT_ROWS`, or
    judging by the samples more than `SPLIT_BYTES`."""
    per_row = max((each.bytes_per_row for each in samples), default=0)
    if not counts.exact or counts.total > min(SPLIT_ROWS, SPLIT_BYTES / max(1, per_row)):
        return None
    spec, rows = stages.spec, dict[str, list[Row]]()
    tokens = control_tokens.pattern(stages.inputs.control_tokens)
    for path, source in spec.data.sources().items():
        staged = stages.inputs.sources[path]
        results = to_results(
            list(sources.read(staged, source)), check_source(staged, source, spec.data, path)
        )
        found = (result for result in results if isinstance(result, Row))
        rows[path] = [row for row in found if control_tokens.find(row.messages, tokens) is None]
    return count_splits(
        rows,
        spec.data,
        normalize_label=answer_kinds.NORMALIZERS[spec.eval.answer],
        classes=spec.eval.answer == "label",
        seed=spec.train.seed,
    )


def sample_rows(stages: RunContext, family: Family) -> tuple[Sample, ...]:
    """A sample of each training source."""
    spec, staged = stages.spec, stages.inputs.sources
    named = list(spec.data.sources().items())[: len(spec.data.train)]
    return tuple(sample_source(staged[at], source, at, family, spec) for at, source in named)


def data_facts(spec: JobSpec, survey: DataSurvey) -> facts.Data:
    samples = survey.samples or ()
    splits = survey.splits
    empty = None if splits is None else _empty_split(spec.data, splits)
    if empty is not None:
        splits = None
    rows, per_epoch, held_out, validation = _split(spec.data, survey.counts, splits)
    tokens = usable = None
    if per_epoch is not None and survey.samples is not None:
        counted = [each.of_rows(without_refused=splits is not None) for each in samples]
        usable = sum(n * share for n, (share, _) in zip(per_epoch, counted, strict=True))
        tokens = sum(n * mean for n, (_, mean) in zip(per_epoch, counted, strict=True))
    refused = [reject for each in samples for reject in each.refused]
    images = [count for each in samples for count in each.images]
    answers = [length for each in samples for length in each.answers]
    longest_answer = answer_lengths.limit(spec.eval.generation, answers)
    unknown = [None] * len(spec.data.train)
    return facts.Data(
        sources=tuple(
            facts.Source(uri=source.uri, rows=n, rows_an_epoch=m)
            for source, n, m in zip(
                spec.data.train, rows or unknown, per_epoch or unknown, strict=True
            )
        ),
        train_rows=None if per_epoch is None else sum(per_epoch),
        held_out_rows=held_out,
        validation_rows=validation,
        exact=splits is not None
        or (survey.counts is not None and survey.counts.exact and not takes_fractions(spec.data)),
        as_prepared=splits is not None,
        asked=spec.eval.max_samples,
        sampled=sum(each.read for each in samples),
        refused=len(refused),
        first_refusal=f"{refused[0].id}: {refused[0].reason}" if refused else None,
        too_long=sum(each.too_long for each in samples),
        question=spec.data.question,
        images_a_row=round(sum(images) / len(images), 2) if images else None,
        rows_without_image=images.count(0),
        tokens_a_row=round(tokens / usable, 1) if tokens and usable else None,
        longest_row=max((size.tokens for size in survey.sizes), default=None),
        tokens_an_epoch=None if tokens is None else round(tokens),
        longest_answer=max(answers, default=None),
        max_new_tokens=longest_answer if answers else None,
        answers_too_long=answer_lengths.too_long(answers, longest_answer) / max(1, len(answers)),
        unknown=reason(survey.unknown),
        missing=survey.missing.problems if survey.missing else (),
        warning=empty or _warning(samples),
    )


def _split(
    spec: DataSpec, counts: RowCounts | None, splits: SplitCounts | None
) -> tuple[Sequence[int] | None, Sequence[int] | None, int | None, int | None]:
    """Training rows of each source, rows of each per epoch by weight, rows to evaluate on, and
    rows to validate on."""
    if counts is None:
        return None, None, None, None
    rows, held_out, validation = list(counts.train), counts.held_out, counts.validation
    if held_out is None and splits is None:
        held_out = round(sum(counts.train) * spec.eval_fraction)
        rows = [n - round(n * spec.eval_fraction) for n in counts.train]
    if splits is not None:
        rows, held_out = list(splits.train), splits.evaluation
        validation = splits.validation if spec.has_validation else None
    elif spec.validation_fraction:
        validation = round(sum(counts.train) * spec.validation_fraction)
        taken = [round(n * spec.validation_fraction) for n in counts.train]
        rows = [n - less for n, less in zip(rows, taken, strict=True)]
    weights = [source.weight for source in spec.train]
    per_epoch = mixture.epoch_rows(rows, weights, spec.stopping_strategy)
    return rows, per_epoch, held_out, validation


def _empty_split(spec: DataSpec, splits: SplitCounts) -> str | None:
    """Why a run would refuse the data, if a split has no row."""
    rows = {"train": sum(splits.train), "evaluate": splits.evaluation}
    if spec.has_validation:
        rows["validate"] = splits.validation
    empty = next((purpose for purpose, count in rows.items() if not count), None)
    if empty is None:
        return None
    return (
        f"no row is left to {empty} on, once rows are split by their content and duplicates "
        "removed: a run will refuse the data with exit code 11, and say what to change"
    )


def _warning(samples: Sequence[Sample]) -> str | None:
    """Why training would refuse the data, judging by the sample."""
    if not any(each.too_long for each in samples) or any(each.sizes for each in samples):
        return None
    return (
        "every sampled row is longer than train.max_length: training will refuse them with exit "
        "code 11; raise max_length, or lower data.max_pixels"
    )


def prepared_bytes(spec: DataSpec, data: facts.Data, survey: DataSurvey) -> int | None:
    """The size of the prepared rows on disk; images are stored unchanged.

    Independent of weights, since rows are not copied; only part of a streamed source is on disk.
    """
    if survey.samples is None or data.train_rows is None:
        return None
    per_row = [sample.bytes_per_row for sample in survey.samples]
    mean = sum(per_row) / len(per_row)
    stored = sum(n * (source.rows or 0) for n, source in zip(per_row, data.sources, strict=True))
    if spec.streaming:
        stored = min(stored, max_full_shards(spec, chunks.ROWS) * chunks.ROWS * mean)
    held_out = (data.held_out_rows or 0) + (data.validation_rows or 0)
    rows = held_out + sum(source.rows or 0 for source in data.sources)
    return round(stored + held_out * mean + rows * BYTES_BESIDE_IMAGES)


def reason(error: JobError | None) -> str | None:
    """The error as text: why something is unknown."""
    return None if error is None else f"{error.problems[0].field} {error.problems[0].message}"

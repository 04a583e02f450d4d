"""The prep stage: converts sources to shards of checked rows."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from job import log, storage
from job.errors import SpecError
from job.prep import control_tokens, sources
from job.prep.chunks import SAMPLE, ChunkResult, SourceTask
from job.prep.contact_sheet import CONTACT_SHEET, SHEET_ROWS, contact_sheet
from job.prep.coverage import class_coverage, warn_missing_classes
from job.prep.dedup import count_duplicates
from job.prep.leakage import LeakedRows, NormalizeLabel, drop_leaked
from job.prep.mixture import SourceShare, write_mixture
from job.prep.notices import (
    log_given_system,
    log_ignored_columns,
    log_image_counts,
    log_shares,
    log_skipped_files,
)
from job.prep.prepared_data import REJECTS, STATS, PreparedData
from job.prep.result_checks import check_result, check_shares, warn_if_mostly_leaked
from job.prep.rows import Row
from job.prep.shards import Rows, sample_rows
from job.prep.source_check import check_source
from job.prep.source_files import DataSource
from job.prep.splits import split_of_source, takes_fractions
from job.prep.totals import Totals
from job.prep.workers import available_workers, convert_chunks
from job.prep.workspace import open_workspace, publish
from job.redaction import as_json
from job.spec.types import DataSpec, SourceSpec
from job.storage.digests import fingerprint


@dataclass(frozen=True, kw_only=True)
class PrepInputs:
    """Everything that the prepared rows depend on."""

    spec: DataSpec
    train: tuple[DataSource, ...]
    evaluation: DataSource | None
    validation: DataSource | None = None
    seed: int
    normalize_label: NormalizeLabel
    """Normalizes labels, to find training rows that duplicate held-out rows."""
    classes: bool = False
    """Whether labels are classes, which both splits should contain."""
    identity: str = ""
    """Anything else that determines the result; chunks of an interrupted prep are reused only if
    it is the same."""
    control_tokens: Sequence[str] = ()
    """The model's control tokens; rows whose text contains one are rejects."""
    published_at: str | None = None
    """The URI under which users find what prep writes; None if that is its directory."""

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """In the order of `spec.sources()`."""
        held_out = (self.evaluation, self.validation)
        return (*self.train, *(source for source in held_out if source is not None))

    @property
    def fingerprint(self) -> str:
        digests = [source.digest for source in self.sources]
        return fingerprint(asdict(self.spec), digests, self.seed, self.identity)


def prepare(
    inputs: PrepInputs, directory: Path, check: Callable[[], None] = lambda: None
) -> PreparedData:
    """Reads, checks and splits the sources into shards under `directory`.

    `check` is called again and again, and ends the work if it raises.

    Raises TooManyBadRows beyond `max_bad_rows`, DataError if a split ends up empty or a source
    lacks the columns that the spec maps, and SpecError for a control token in the instruction or
    the system prompt.
    """
    spec = inputs.spec
    _check_prompts(inputs)
    workspace = open_workspace(directory, inputs.fingerprint)
    tasks = _source_tasks(inputs, workspace)
    totals = Totals.collect(_convert(inputs, tasks, check), workspace, spec)
    publish(workspace, directory, spec)

    leaked = drop_leaked(
        directory,
        remove=spec.leakage == "remove",
        validation_by=totals.validation_by(directory),
    )
    warn_if_mostly_leaked(spec, totals, leaked)
    shares = write_mixture(directory, spec) if len(inputs.train) > 1 else []
    skipped = log_skipped_files([task.label for task in tasks], inputs.sources, totals.junk_members)
    _write_stats(directory, totals, leaked, skipped, shares)

    coverage = class_coverage(directory, spec, inputs.normalize_label, classes=inputs.classes)
    rejects = storage.join(inputs.published_at or str(directory), REJECTS)
    check_result(spec, totals, leaked, coverage, rejects=rejects)
    if coverage is not None and (inputs.classes or "image" in totals.leakage_by.values()):
        warn_missing_classes(coverage, spec)
    check_shares(shares)
    log_shares(shares)
    if spec.system is not None:
        log_given_system(totals.statistics)
    log_image_counts(totals.statistics)
    log_ignored_columns(totals.ignored)
    _draw_contact_sheet(directory, spec, inputs.seed)
    return PreparedData(
        directory=directory,
        train_rows=sum(s.trained for s in shares) if shares else totals.train_rows - leaked.train,
        eval_rows=totals.eval_rows,
        rejected_rows=totals.rejected,
        leaked_rows=leaked.train,
        validation_rows=totals.validation_rows - leaked.validation if spec.has_validation else None,
        leaked_validation_rows=leaked.validation,
    )


def _check_prompts(inputs: PrepInputs) -> None:
    tokens = control_tokens.pattern(inputs.control_tokens)
    for key in ("instruction", "system"):
        if (match := tokens.search(getattr(inputs.spec, key) or "")) is not None:
            raise SpecError(
                f"$.data.{key}",
                "contains a control token of the model",
                value=match[0],
                fix="remove it; images are put before the instruction automatically",
            )


def _source_tasks(inputs: PrepInputs, workspace: Path) -> list[SourceTask]:
    """Checks the first rows of each source; returns a task for each."""
    spec, tasks = inputs.spec, []
    for index, (field, source_spec) in enumerate(spec.sources().items()):
        source = inputs.sources[index]
        split = split_of_source(field)
        tasks.append(
            SourceTask(
                spec=spec,
                split=split,
                options=check_source(source, source_spec, spec, field),
                directory=workspace,
                seed=inputs.seed,
                normalize_label=inputs.normalize_label,
                classes=inputs.classes,
                leakage_by="image_and_answer" if split == "eval" else None,
                hold_out=split == "train" and takes_fractions(spec),
                source_index=index if len(inputs.train) > 1 and split == "train" else None,
                control_tokens=control_tokens.pattern(inputs.control_tokens),
            )
        )
    return tasks


def _convert(
    inputs: PrepInputs, tasks: Sequence[SourceTask], check: Callable[[], None]
) -> Iterator[tuple[str, ChunkResult]]:
    """Converts all sources; yields each chunk's result with its source's label."""
    source_specs = inputs.spec.sources().values()
    for task, source, source_spec in zip(tasks, inputs.sources, source_specs, strict=True):
        for result in _convert_source(task, source, source_spec):
            check()
            yield task.label, result


def _convert_source(
    task: SourceTask, source: DataSource, source_spec: SourceSpec
) -> Iterator[ChunkResult]:
    total = sources.known_count(source, source_spec)
    workers = available_workers(task.spec.num_proc)
    with log.progress(f"prep {task.label}", total) as bar:
        for result in convert_chunks(task, sources.read(source, source_spec), workers):
            bar.advance(result.records)
            yield result


def _write_stats(
    directory: Path,
    totals: Totals,
    leaked: LeakedRows,
    skipped: dict[str, dict[str, int]],
    shares: Sequence[SourceShare],
) -> None:
    not_empty: dict[str, Counter[str]] = {k: v for k, v in totals.ignored.items() if v}
    stats: dict[str, object] = {
        **{split: each.summary() for split, each in totals.statistics.items()},
        "leaked": {
            "rows": leaked.train,
            **({"validation_rows": leaked.validation} if "validation" in totals.statistics else {}),
        },
        "kept_apart_by": totals.leakage_by,
        "duplicates": count_duplicates(directory),
        "not_read": {label: dict(counts) for label, counts in not_empty.items()},
        "passed_over": skipped,
        "rejected": {"rows": totals.rejected, "reasons": totals.most_frequent_reasons},
        **({"sources": [share.to_json() for share in shares]} if shares else {}),
    }
    (directory / STATS).write_text(as_json(stats, indent=2) + "\n", encoding="utf-8")


def _draw_contact_sheet(directory: Path, spec: DataSpec, seed: int) -> None:
    """Draws a few training rows; if streaming, those that were stored with images for it."""
    sample = directory / SAMPLE
    if spec.streaming:
        rows: list[Row] = Rows([sample])[:SHEET_ROWS]
    else:
        rows = sample_rows(directory, "train", SHEET_ROWS, seed)
    contact_sheet(rows, directory / CONTACT_SHEET)
    sample.unlink(missing_ok=True)

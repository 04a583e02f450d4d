"""The prep stage: sources in, checked rows in shards out."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from job import log
from job.errors import DataError, Problem, SpecError
from job.prep import control_tokens as control
from job.prep import sources
from job.prep.chunks import SAMPLE, Note, Task, available_workers, make
from job.prep.contact_sheet import ROWS, SHEET, contact_sheet
from job.prep.coverage import Coverage, coverage, tell
from job.prep.dedup import duplicates
from job.prep.discovery import StagedSource
from job.prep.leakage import By, LabelKey, drop_leaked
from job.prep.mixture import Ingredient, mix
from job.prep.notices import passed_over, tell_images, tell_unread
from job.prep.rows import Reject, Row
from job.prep.shards import Rows, ShardWriter, Split, pick, shards
from job.prep.source_check import find_reading
from job.prep.statistics import Statistics
from job.prep.streaming import CHUNKS, Pictures, StreamedRows
from job.redaction import as_json
from job.spec.types import DataSpec, SourceSpec
from job.storage.digests import fingerprint

REJECTS, STATS = "rejects.jsonl", "stats.json"
SHOWN_REJECTS = 5
MOST_REASONS = 50
_BY_IMAGE = "; where many pictures share one answer, set data.leakage_by: image"


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What prep leaves in `directory`: shards, `stats.json` and `rejects.jsonl`."""

    directory: Path
    train_rows: int
    """Rows of an epoch: in a mixture some may stand in it more than once, or not at all."""
    eval_rows: int
    rejected_rows: int
    leaked_rows: int
    """Training rows removed because a held-out row shows or says the same."""
    pictures: Pictures | None = None
    """Where those of the rows to train come from, if prep does not keep them."""

    def rows(self, split: Split) -> Sequence[Row]:
        if split == "train" and self.pictures is not None:
            return StreamedRows(self.pictures)
        return Rows.of(self.directory, split)

    def measured_rows(self) -> Sequence[Row]:
        """The rows to train with the sizes of their pictures, and perhaps not their bytes."""
        return Rows.of(self.directory, "train")


class TooManyBadRows(DataError):
    """More rows were refused than the spec allows; `rejects.jsonl` in `directory` lists them."""


def prepare(
    spec: DataSpec,
    train: Sequence[StagedSource],
    evaluation: StagedSource | None,
    directory: Path,
    *,
    seed: int,
    label_key: LabelKey,
    classes: bool = False,
    identity: str = "",
    control_tokens: Sequence[str] = (),
) -> PreparedData:
    """Reads, checks and splits the sources into shards under `directory`.

    `label_key` gives a label's normal form, by which no held-out row stays in training; `classes`
    says that labels are those of a few classes, each of which both splits should hold. Rows whose
    text holds one of the model's `control_tokens` are rejects. What a killed call left is used
    again if spec, sources and `identity` are the same.

    Raises TooManyBadRows beyond `max_bad_rows`, DataError if a split ends up empty or a source has
    not the columns that the spec maps, and SpecError for a control token in the instruction.
    """
    tokens = control.pattern(control_tokens)
    if (found := tokens.search(spec.instruction or "")) is not None:
        raise SpecError(
            "$.data.instruction",
            "holds a control token of the model",
            value=found[0],
            fix="remove it; an image stands before the instruction by itself",
        )
    staged = [*train, *([evaluation] if evaluation else [])]
    pairs = list(zip(staged, spec.sources().values(), strict=True))
    digests = [source.digest for source in staged]
    work = _workplace(directory, fingerprint(asdict(spec), digests, seed, identity))
    tasks = [
        Task(
            spec=spec,
            source="eval" if source is evaluation else "train",
            reading=find_reading(source, source_spec, spec, field),
            directory=work,
            seed=seed,
            label_key=label_key,
            classes=classes,
            by="image_and_answer" if source is evaluation else None,
            splits=evaluation is None,
            part=number if len(train) > 1 and source is not evaluation else None,
            control=tokens,
        )
        for number, (field, (source, source_spec)) in enumerate(
            zip(spec.sources(), pairs, strict=True)
        )
    ]
    reasons: Counter[str] = Counter()
    shown: list[Reject] = []
    statistics: dict[Split, Statistics] = {"train": Statistics(), "eval": Statistics()}
    unread: dict[str, Counter[str]] = {}
    members = Counter[str]()
    apart: dict[str, By] = {}
    with ExitStack() as files:
        lines = files.enter_context((work / REJECTS).open("w", encoding="utf-8"))
        chunks = files.enter_context((work / CHUNKS).open("w", encoding="utf-8"))
        for task, (source, source_spec) in zip(tasks, pairs, strict=True):
            for note in _notes(task, source, source_spec):
                if task.source == "train":
                    apart[task.label] = note.by
                for split, kept in note.statistics.items():
                    statistics[split].merge(kept)
                unread.setdefault(task.label, Counter()).update(note.unread)
                members[task.label] += note.passed_over
                if note.chunk is not None:
                    chunks.write(json.dumps(note.chunk.to_json()) + "\n")
                for reject in note.rejects:
                    reasons[reject.reason.split(":")[0]] += 1
                    shown += [reject] if len(shown) < SHOWN_REJECTS else []
                    lines.write(as_json(asdict(reject)) + "\n")
    rejected = reasons.total()
    _take(work, directory, streamed=spec.streaming)
    leaked = drop_leaked(directory, remove=spec.leakage == "remove")
    # Rows without images are compared by what they say, whatever the key.
    by_image = _BY_IMAGE if statistics["train"].images and set(apart.values()) != {"image"} else ""
    if spec.leakage == "remove" and 2 * leaked > statistics["train"].rows:
        log.warn(
            "most rows to train show or say what a held-out row does, and are left out",
            left_out=log.of(leaked, statistics["train"].rows),
            fix=f"evaluate on other rows than those that train{by_image}",
        )
    mixed = mix(directory, spec) if len(train) > 1 else []
    kept_rows = statistics["train"].rows - leaked
    if mixed:
        kept_rows = sum(each.trained for each in mixed)
    stats: dict[str, object] = {split: kept.summary() for split, kept in statistics.items()}
    stats["leaked"] = {"rows": leaked}
    stats["kept_apart_by"] = apart
    stats["duplicates"] = duplicates(directory)
    stats["not_read"] = {label: dict(found) for label, found in unread.items() if found}
    stats["passed_over"] = passed_over([task.label for task in tasks], staged, members)
    stats["rejected"] = {"rows": rejected, "reasons": dict(reasons.most_common(MOST_REASONS))}
    if mixed:
        stats["sources"] = [asdict(each) for each in mixed]
    (directory / STATS).write_text(as_json(stats, indent=2) + "\n", encoding="utf-8")
    covered = coverage(directory, label_key, classes=classes)
    trained, judged = statistics["train"].rows, statistics["eval"].rows
    _check(spec, shown, rejected, trained, judged, leaked, covered, by_image)
    if covered is not None and (classes or "image" in apart.values()):
        tell(covered, fraction=None if spec.eval else spec.eval_fraction)
    _tell(mixed)
    tell_images(statistics)
    tell_unread(unread)
    contact_sheet(_some_rows(directory, spec, seed), directory / SHEET)
    (directory / SAMPLE).unlink(missing_ok=True)
    return PreparedData(
        directory=directory,
        train_rows=kept_rows,
        eval_rows=statistics["eval"].rows,
        rejected_rows=rejected,
        leaked_rows=leaked,
    )


def _to_split(spec: DataSpec, classes: Coverage | None, change: str) -> str:
    """What to do where every row falls on one side: by an answer that many share, or by chance."""
    if classes is not None and spec.leakage_by == "image_and_answer":
        return (
            "set data.leakage_by: image, as many rows share their answers and are held out together"
        )
    return f"name a source in data.eval, or {change} data.eval_fraction"


def _notes(task: Task, source: StagedSource, source_spec: SourceSpec) -> Iterator[Note]:
    """Every chunk's note, with progress in rows."""
    total = sources.known_count(source, source_spec)
    workers = available_workers(task.spec.num_proc)
    with log.progress(f"prep {task.label}", total) as bar:
        for note in make(task, sources.read(source, source_spec), workers):
            bar.advance(note.records)
            yield note


def _some_rows(directory: Path, spec: DataSpec, seed: int) -> list[Row]:
    """A few rows to train, with pictures: of all, or of those that were kept to be seen."""
    if spec.streaming:
        kept: list[Row] = Rows([directory / SAMPLE])[:ROWS]
        return kept
    return pick(directory, "train", ROWS, seed)


def _tell(mixed: list[Ingredient]) -> None:
    """Says what each source gives; raises DataError where one gives nothing."""
    for empty in (each for each in mixed if not each.rows):
        raise DataError(
            f"$.{empty.source}",
            "has no row to train on",
            value=empty.uri,
            fix="check its `limit` and rows, or take it off the list",
        )
    total = sum(each.trained for each in mixed)
    for each in mixed:
        log.info(
            each.source,
            uri=each.uri,
            rows=each.rows,
            trained=each.trained,
            share=f"{each.trained / total:.1%}",
            held_out=each.held_out,
        )


def _workplace(directory: Path, identity: str) -> Path:
    """The folder for shards in the making: what a killed job left there of the same work stays."""
    work = directory.parent.with_name(f"{directory.parent.name}.partial")
    known = work / "identity"
    if not known.exists() or known.read_text() != identity:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        known.write_text(identity)
    elif found := len(list(work.glob("*-*.json"))):
        log.info("prep goes on where it was interrupted", chunks_done=found)
    return work


def _take(work: Path, directory: Path, *, streamed: bool) -> None:
    """Moves what is made into `directory`; a split without rows gets one empty shard."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (work / "identity").unlink()  # from here on the work is not whole
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        for shard in shards(work, split):
            shard.rename(directory / shard.name)
        if not shards(directory, split):
            ShardWriter(directory / f"{split}-00000.arrow").close()
    for name in (REJECTS, *((CHUNKS, SAMPLE) if streamed else ())):
        (work / name).rename(directory / name)
    shutil.rmtree(work)


def _check(
    spec: DataSpec,
    rejects: list[Reject],
    rejected: int,
    train_rows: int,
    eval_rows: int,
    leaked: int,
    classes: Coverage | None,
    by_image: str,
) -> None:
    shown = [Problem(reject.id, reject.reason) for reject in rejects]
    if rejected > len(shown):
        shown.append(Problem("…", f"and {rejected - len(shown)} more"))
    if rejected > spec.max_bad_rows:
        summary = Problem(
            "$.data.max_bad_rows",
            f"{rejected} of {rejected + train_rows + eval_rows} rows cannot be used, "
            f"more than the {spec.max_bad_rows} allowed",
            fix=f"mend the rows listed in data/{REJECTS}, or allow them: "
            f"--set data.max_bad_rows={rejected}",
        )
        raise TooManyBadRows.from_problems([summary, *shown])
    if not train_rows and eval_rows and not spec.eval:
        raise DataError(
            "$.data.eval_fraction",
            f"holds out all {eval_rows} rows, and leaves none to train on",
            value=spec.eval_fraction,
            fix=_to_split(spec, classes, "lower"),
        )
    if not train_rows:
        nothing = Problem(
            "$.data.train", "has no usable row", fix="check `uri`, `limit` and the rows"
        )
        raise DataError.from_problems([nothing, *shown])
    if not eval_rows:
        raise DataError(
            "$.data.eval" if spec.eval else "$.data.eval_fraction",
            "leaves no row to evaluate on",
            value=None if spec.eval else spec.eval_fraction,
            fix="check its `uri`, `limit` and rows"
            if spec.eval
            else _to_split(spec, classes, "raise"),
        )
    if leaked and spec.leakage == "refuse":
        raise DataError(
            "$.data.leakage",
            f"{leaked} training rows show or say what a held-out row does",
            value=spec.leakage,
            fix=f"take them out of one of the two, or set data.leakage: remove{by_image}",
        )
    if leaked == train_rows:
        raise DataError(
            "$.data.train",
            f"all {train_rows} rows show or say what a held-out row does",
            fix=f"evaluate on other rows than those that train{by_image}",
        )

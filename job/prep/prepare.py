"""The prep stage: sources in, checked rows in shards out."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from job import log
from job.errors import DataError, Problem
from job.prep import sources
from job.prep.convert import find_columns, to_result
from job.prep.find import StagedSource
from job.prep.leakage import LabelKey, drop_leaked
from job.prep.records import Reject, Row
from job.prep.shards import Rows, ShardWriter, Split
from job.prep.splits import held_out, split_key
from job.spec.types import DataSpec, SourceSpec

REJECTS, STATS = "rejects.jsonl", "stats.json"
IN_FLIGHT = 64  # rows fetched ahead: enough to hide an object store's latency
SHOWN_REJECTS = 5


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What prep leaves in `directory`: shards, `stats.json` and `rejects.jsonl`."""

    directory: Path
    train_rows: int
    eval_rows: int
    rejected_rows: int
    leaked_rows: int
    """Training rows removed because a held-out row shows or says the same."""

    def rows(self, split: Split) -> Rows:
        return Rows(self.directory, split)


class TooManyBadRows(DataError):
    """More rows were refused than the spec allows; `rejects.jsonl` in `directory` lists them."""


def prepare(
    spec: DataSpec,
    train: StagedSource,
    evaluation: StagedSource | None,
    directory: Path,
    *,
    seed: int,
    label_key: LabelKey,
) -> PreparedData:
    """Reads, checks and splits the sources into shards under `directory`.

    `label_key` gives a label's normal form, by which no held-out row stays in training.

    Raises TooManyBadRows beyond `max_bad_rows`, and DataError where a split ends up empty or a
    source has not the columns that the spec maps.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rejects: list[Reject] = []
    statistics = {"train": _Statistics(), "eval": _Statistics()}
    writers: dict[Split, ShardWriter] = {
        "train": ShardWriter(directory, "train"),
        "eval": ShardWriter(directory, "eval"),
    }

    def keep(split: Split, row: Row) -> None:
        writers[split].write(row)
        statistics[split].add(row)

    for row in _rows(spec, spec.train, train, rejects, "train"):
        apart = evaluation is None and held_out(
            split_key(row, label_key), fraction=spec.eval_fraction, seed=seed
        )
        keep("eval" if apart else "train", row)
    if evaluation is not None:
        assert spec.eval is not None
        for row in _rows(spec, spec.eval, evaluation, rejects, "eval"):
            keep("eval", row)
    for writer in writers.values():
        writer.close()

    leaked = drop_leaked(directory, label_key)
    with (directory / REJECTS).open("w", encoding="utf-8") as lines:
        for reject in rejects:
            lines.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")
    stats: dict[str, object] = {split: kept.summary() for split, kept in statistics.items()}
    stats["leaked"] = {"rows": leaked}
    stats["rejected"] = {
        "rows": len(rejects),
        "reasons": dict(Counter(reject.reason.split(":")[0] for reject in rejects).most_common()),
    }
    (directory / STATS).write_text(json.dumps(stats, indent=2, ensure_ascii=False) + "\n")
    _check(spec, rejects, writers["train"].rows, writers["eval"].rows)
    return PreparedData(
        directory=directory,
        train_rows=writers["train"].rows - leaked,
        eval_rows=writers["eval"].rows,
        rejected_rows=len(rejects),
        leaked_rows=leaked,
    )


def _check(spec: DataSpec, rejects: list[Reject], train_rows: int, eval_rows: int) -> None:
    if len(rejects) > spec.max_bad_rows:
        shown = [Problem(reject.id, reject.reason) for reject in rejects[:SHOWN_REJECTS]]
        more = len(rejects) - len(shown)
        summary = Problem(
            "$.data.max_bad_rows",
            f"{len(rejects)} of {len(rejects) + train_rows + eval_rows} rows cannot be used, "
            f"more than the {spec.max_bad_rows} allowed",
            fix=f"mend the rows listed in data/{REJECTS}, or allow them: "
            f"--set data.max_bad_rows={len(rejects)}",
        )
        rest = [Problem("…", f"and {more} more")] if more else []
        raise TooManyBadRows.from_problems([summary, *shown, *rest])
    if not train_rows:
        raise DataError(
            "$.data.train", "has no usable row", fix="check `uri`, `limit` and the rows"
        )
    if not eval_rows:
        raise DataError(
            "$.data.eval" if spec.eval else "$.data.eval_fraction",
            "leaves no row to evaluate on",
            value=None if spec.eval else spec.eval_fraction,
            fix="name a source in data.eval, or raise data.eval_fraction",
        )


def _rows(
    spec: DataSpec,
    source_spec: SourceSpec,
    source: StagedSource,
    rejects: list[Reject],
    key: str,
) -> Iterator[Row]:
    """The source's rows in order; what cannot be one is appended to `rejects`."""
    columns = find_columns(source, source_spec, f"$.data.{key}")
    total = sources.count(source, source_spec)

    def convert(record: sources.Record) -> Row | Reject:
        return to_result(record, columns, spec)

    with log.progress(f"prep {key}", total) as bar:
        for result in _ordered_map(convert, sources.read(source, source_spec)):
            bar.advance()
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                yield result


def _ordered_map(
    convert: Callable[[sources.Record], Row | Reject], records: Iterator[sources.Record]
) -> Iterator[Row | Reject]:
    """Converts in threads, a bounded number ahead, and yields in order."""
    pending: deque[Future[Row | Reject]] = deque()
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="prep") as pool:
        try:
            for record in records:
                pending.append(pool.submit(convert, record))
                if len(pending) >= IN_FLIGHT:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class _Statistics:
    """Running figures of one split, without its rows in memory."""

    def __init__(self) -> None:
        self.rows = self.images = self.characters = self.longest = self.pixels = self.largest = 0

    def add(self, row: Row) -> None:
        self.rows += 1
        self.images += len(row.images)
        self.characters += len(row.answer)
        self.longest = max(self.longest, len(row.answer))
        for image in row.images:
            area = image.width * image.height
            self.pixels += area
            self.largest = max(self.largest, area)

    def summary(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "images": self.images,
            "answer_characters": {
                "mean": round(self.characters / max(1, self.rows), 1),
                "max": self.longest,
            },
            "image_pixels": {
                "mean": round(self.pixels / max(1, self.images), 1),
                "max": self.largest,
            },
        }

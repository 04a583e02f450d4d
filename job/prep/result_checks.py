"""Errors about the prepared rows as a whole: too many rejects, an empty split, leaked rows."""

from collections.abc import Sequence

from job import log
from job.errors import DataError, Problem
from job.prep.coverage import ClassCoverage
from job.prep.mixture import SourceShare
from job.prep.prepared_data import REJECTS
from job.prep.totals import Totals
from job.spec.types import DataSpec

_BY_IMAGE = "; if many images share one answer, set data.leakage_by: image"


class TooManyBadRows(DataError):
    """More rows were rejected than the spec allows; `rejects.jsonl` lists them."""


def warn_if_mostly_leaked(spec: DataSpec, totals: Totals, leaked: int) -> None:
    if spec.leakage == "remove" and 2 * leaked > totals.train_rows:
        log.warn(
            "most training rows duplicate held-out rows and are left out",
            left_out=log.fraction(leaked, totals.train_rows),
            fix=_other_rows(totals),
        )


def check_result(
    spec: DataSpec, totals: Totals, leaked: int, coverage: ClassCoverage | None
) -> None:
    """Raises TooManyBadRows beyond `max_bad_rows`, else DataError if a split has no rows or
    `leakage: refuse` found leaked ones."""
    _check_rejects(spec, totals)
    _check_splits(spec, totals, coverage)
    _check_leakage(spec, totals, leaked)


def check_shares(shares: Sequence[SourceShare]) -> None:
    """Raises DataError if a source of a mixture has no rows."""
    for share in shares:
        if not share.rows:
            raise DataError(
                f"$.{share.source}",
                "has no row to train on",
                value=share.uri,
                fix="check its `limit` and rows, or remove it from the list",
            )


def _check_rejects(spec: DataSpec, totals: Totals) -> None:
    rejected = totals.rejected
    if rejected > spec.max_bad_rows:
        summary = Problem(
            "$.data.max_bad_rows",
            f"{rejected} of {rejected + totals.train_rows + totals.eval_rows} rows cannot be used, "
            f"more than the {spec.max_bad_rows} allowed",
            fix=f"fix the rows listed in data/{REJECTS}, or allow them: "
            f"--set data.max_bad_rows={rejected}",
        )
        raise TooManyBadRows.from_problems([summary, *_first_rejects(totals)])


def _first_rejects(totals: Totals) -> list[Problem]:
    shown = [Problem(reject.id, reject.reason) for reject in totals.first_rejects]
    if totals.rejected > len(shown):
        shown.append(Problem("…", f"and {totals.rejected - len(shown)} more"))
    return shown


def _check_splits(spec: DataSpec, totals: Totals, coverage: ClassCoverage | None) -> None:
    train_rows, eval_rows = totals.train_rows, totals.eval_rows
    if not train_rows and eval_rows and not spec.eval:
        raise DataError(
            "$.data.eval_fraction",
            f"holds out all {eval_rows} rows, leaving none to train on",
            value=spec.eval_fraction,
            fix=_split_fix(spec, coverage, "lower"),
        )
    if not train_rows:
        empty = Problem("$.data.train", "has no usable row", fix="check `uri`, `limit` and rows")
        raise DataError.from_problems([empty, *_first_rejects(totals)])
    if not eval_rows and spec.eval:
        raise DataError(
            "$.data.eval",
            "leaves no row to evaluate on",
            fix="check its `uri`, `limit` and rows",
        )
    if not eval_rows:
        raise DataError(
            "$.data.eval_fraction",
            "leaves no row to evaluate on",
            value=spec.eval_fraction,
            fix=_split_fix(spec, coverage, "raise"),
        )


def _split_fix(spec: DataSpec, coverage: ClassCoverage | None, change: str) -> str:
    """How to get rows into both splits: answers that many rows share may have kept them in one."""
    if coverage is not None and spec.leakage_by == "image_and_answer":
        return (
            "set data.leakage_by: image; many rows share their answers, which are held out together"
        )
    return f"name a source in data.eval, or {change} data.eval_fraction"


def _check_leakage(spec: DataSpec, totals: Totals, leaked: int) -> None:
    if leaked and spec.leakage == "refuse":
        raise DataError(
            "$.data.leakage",
            f"{leaked} training rows duplicate held-out rows",
            value=spec.leakage,
            fix=f"remove them from one of the two, or set data.leakage: remove{_by_image(totals)}",
        )
    if leaked == totals.train_rows:
        raise DataError(
            "$.data.train",
            f"all {totals.train_rows} rows duplicate held-out rows",
            fix=_other_rows(totals),
        )


def _other_rows(totals: Totals) -> str:
    return f"evaluate on rows that are not trained on{_by_image(totals)}"


def _by_image(totals: Totals) -> str:
    return _BY_IMAGE if totals.compares_answers else ""

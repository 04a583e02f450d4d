"""Errors about the prepared rows as a whole: too many rejects, an empty split, leaked rows."""

from collections.abc import Sequence
from typing import NoReturn

from job import log
from job.errors import DataError, Problem
from job.prep.coverage import ClassCoverage
from job.prep.leakage import LeakedRows
from job.prep.mixture import SourceShare
from job.prep.shards import Split
from job.prep.totals import Totals
from job.spec.types import DataSpec, SourceSpec

_BY_IMAGE = "; if many images share one answer, set data.leakage_by: image"


class TooManyBadRows(DataError):
    """More rows were rejected than the spec allows; `rejects.jsonl` lists them."""


def warn_if_mostly_leaked(spec: DataSpec, totals: Totals, leaked: LeakedRows) -> None:
    if spec.leakage != "remove":
        return
    if 2 * leaked.train > totals.train_rows:
        log.warn(
            "most training rows duplicate held-out rows and are left out",
            left_out=log.fraction(leaked.train, totals.train_rows),
            fix=_other_rows(spec, totals),
        )
    if 2 * leaked.validation > totals.validation_rows:
        log.warn(
            "most validation rows duplicate rows to evaluate on and are left out",
            left_out=log.fraction(leaked.validation, totals.validation_rows),
            fix=_other_validation_rows(totals),
        )


def check_result(
    spec: DataSpec,
    totals: Totals,
    leaked: LeakedRows,
    coverage: ClassCoverage | None,
    *,
    rejects: str,
) -> None:
    """Raises TooManyBadRows beyond `max_bad_rows`, else DataError if a split has no rows or
    `leakage: refuse` found leaked ones. `rejects` is the URI of the list of rejected rows."""
    _check_rejects(spec, totals, rejects)
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


def _check_rejects(spec: DataSpec, totals: Totals, rejects: str) -> None:
    rejected = totals.rejected
    if rejected > spec.max_bad_rows:
        # If they leave a split empty, allowing them would only lead to the next error.
        can_do_without = all(totals.rows(split) for split in totals.statistics)
        allow = f", or allow them: --set data.max_bad_rows={rejected}"
        summary = Problem(
            "$.data.max_bad_rows",
            f"{rejected} of {rejected + totals.all_rows} rows cannot be used, "
            f"more than the {spec.max_bad_rows} allowed",
            fix=f"fix the rows listed in {rejects}{allow if can_do_without else ''}",
        )
        raise TooManyBadRows.from_problems([summary, *_first_rejects(totals)])


def _first_rejects(totals: Totals) -> list[Problem]:
    shown = [Problem(reject.id, reject.reason) for reject in totals.first_rejects]
    if totals.rejected > len(shown):
        shown.append(Problem("…", f"and {totals.rejected - len(shown)} more"))
    return shown


def _check_splits(spec: DataSpec, totals: Totals, coverage: ClassCoverage | None) -> None:
    if not totals.train_rows:
        _refuse_held_out_rows_only(spec, totals, coverage)
        empty = Problem("$.data.train", "has no usable row", fix="check `uri`, `limit` and rows")
        raise DataError.from_problems([empty, *_first_rejects(totals)])
    if not totals.eval_rows:
        message = "leaves no row to evaluate on"
        _refuse_empty(spec, coverage, "eval", spec.eval, spec.eval_fraction, message)
    if spec.has_validation and not totals.validation_rows:
        message = "leaves no row to validate on"
        source, fraction = spec.validation, spec.validation_fraction
        _refuse_empty(spec, coverage, "validation", source, fraction, message)


def _refuse_empty(
    spec: DataSpec,
    coverage: ClassCoverage | None,
    split: Split,
    source: SourceSpec | None,
    fraction: float,
    message: str,
) -> NoReturn:
    if source is not None:
        raise DataError(f"$.data.{split}", message, fix="check its `uri`, `limit` and rows")
    raise DataError(
        f"$.data.{split}_fraction",
        message,
        value=fraction,
        fix=_split_fix(spec, coverage, split, "raise"),
    )


def _refuse_held_out_rows_only(
    spec: DataSpec, totals: Totals, coverage: ClassCoverage | None
) -> None:
    """Raises DataError if the fractions hold out all training rows."""
    fractions: dict[Split, float] = {} if spec.eval else {"eval": spec.eval_fraction}
    if spec.validation is None:
        fractions["validation"] = spec.validation_fraction
    held_out = [split for split in fractions if totals.rows(split)]
    if not held_out:
        return
    split, *others = held_out
    together = "".join(f", together with data.{other}_fraction," for other in others)
    raise DataError(
        f"$.data.{split}_fraction",
        f"holds out{together} all {sum(map(totals.rows, held_out))} rows, leaving none to train on",
        value=fractions[split],
        fix=_split_fix(spec, coverage, split, "lower"),
    )


def _split_fix(spec: DataSpec, coverage: ClassCoverage | None, split: Split, change: str) -> str:
    """How to get rows into every split: answers that many rows share may have kept them in one."""
    if coverage is not None and spec.leakage_by == "image_and_answer":
        return (
            "set data.leakage_by: image; many rows share their answers, which are held out together"
        )
    return f"name a source in data.{split}, or {change} data.{split}_fraction"


def _check_leakage(spec: DataSpec, totals: Totals, leaked: LeakedRows) -> None:
    if spec.leakage == "refuse":
        messages = [
            *([f"{leaked.train} training rows duplicate held-out rows"] if leaked.train else []),
            *(
                [f"{leaked.validation} validation rows duplicate rows to evaluate on"]
                if leaked.validation
                else []
            ),
        ]
        fix = "remove them from one of the two, or set data.leakage: remove"
        problems = [
            Problem("$.data.leakage", message, value=spec.leakage, fix=f"{fix}{_by_image(totals)}")
            for message in messages
        ]
        if problems:
            raise DataError.from_problems(problems)
    if leaked.train == totals.train_rows:
        raise DataError(
            "$.data.train",
            f"all {totals.train_rows} rows duplicate held-out rows",
            fix=_other_rows(spec, totals),
        )
    if leaked.validation and leaked.validation == totals.validation_rows:
        raise DataError(
            "$.data.validation" if spec.validation else "$.data.validation_fraction",
            f"all {totals.validation_rows} rows duplicate rows to evaluate on",
            fix=_other_validation_rows(totals),
        )


def _other_rows(spec: DataSpec, totals: Totals) -> str:
    judge = "evaluate and validate" if spec.has_validation else "evaluate"
    return f"{judge} on rows that are not trained on{_by_image(totals)}"


def _other_validation_rows(totals: Totals) -> str:
    return f"validate on rows that are not evaluated on{_by_image(totals)}"


def _by_image(totals: Totals) -> str:
    return _BY_IMAGE if totals.compares_answers else ""

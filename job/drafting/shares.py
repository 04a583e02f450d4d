"""Proposes which fractions of the rows to hold out, and how long to train."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from job.evaluation.answer_kinds import NORMALIZERS
from job.prep.leakage import RowKeys
from job.prep.rows import Row
from job.prep.splits import resolve_leakage_by, split_of
from job.spec import keys
from job.spec.answer_kinds import Answer
from job.spec.types import DataSpec

WANTED_ROWS = 200
"""Rows to evaluate or validate on: with fewer, a metric's error is more than a few percent."""
FEWEST_ROWS = 40
"""With fewer rows, none is taken from training to validate on."""
_FRACTIONS = (0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Fractions of the training rows, and the rows that they are; 0 holds out none."""

    evaluation: float
    validation: float
    evaluation_rows: int
    validation_rows: int
    exact: bool
    """Whether the rows are counted."""
    epochs: int


def propose(rows: int, sample: Sequence[Row], data: DataSpec, answer: Answer) -> Shares:
    """For `rows` rows that begin with `sample`. A split that `data` names takes no fraction."""
    fractions = [each for each in _FRACTIONS if rows >= WANTED_ROWS / 2 or each > _FRACTIONS[0]]
    if rows > 10 * WANTED_ROWS:
        fractions = [float(f"{WANTED_ROWS / rows:.1g}")]
    proposals = [_proposal(rows, data, fraction) for fraction in fractions]
    if len(sample) < rows:
        return proposals[0]
    # All rows are known, so it can be tried which fractions leave no split empty.
    normalize = NORMALIZERS[answer]
    by = resolve_leakage_by(data, normalize, sample, classes=answer == "label")
    groups = [RowKeys(row, normalize, by).split_group for row in sample]
    counted = [_counted(proposal, groups, data) for proposal in proposals]
    return next((each for each in counted if _fills_every_split(each, rows)), counted[0])


def _proposal(rows: int, data: DataSpec, fraction: float) -> Shares:
    evaluation = 0.0 if data.eval else fraction
    validation = fraction if rows >= FEWEST_ROWS and not data.validation else 0.0
    return Shares(
        evaluation=evaluation,
        validation=validation,
        evaluation_rows=round(evaluation * rows),
        validation_rows=round(validation * rows),
        exact=False,
        epochs=3 if rows <= 50 * WANTED_ROWS else 1,
    )


def _counted(shares: Shares, groups: Sequence[str], data: DataSpec) -> Shares:
    """The proposal with the rows that prep will hold out, if it rejects none."""
    seed = keys.default("train.seed")
    assert isinstance(seed, int)
    tried = replace(data, eval_fraction=shares.evaluation, validation_fraction=shares.validation)
    found = Counter(split_of(group, tried, seed) for group in groups)
    return replace(
        shares,
        evaluation_rows=found["eval"],
        validation_rows=found["validation"],
        exact=True,
    )


def _fills_every_split(shares: Shares, rows: int) -> bool:
    return (
        bool(shares.evaluation_rows) >= bool(shares.evaluation)
        and bool(shares.validation_rows) >= bool(shares.validation)
        and shares.evaluation_rows + shares.validation_rows < rows
    )

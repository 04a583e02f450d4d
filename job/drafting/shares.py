"""Proposes which fractions of the rows to hold out, and how long to train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from job.evaluation.answer_kinds import NORMALIZERS
from job.prep.leakage import RowKeys
from job.prep.rows import Row
from job.prep.split_counts import count_splits
from job.prep.splits import resolve_leakage_by, split_of
from job.spec import keys
from job.spec.answer_kinds import Answer
from job.spec.types import DataSpec

WANTED_ROWS = 200
"""Rows to evaluate or validate on: with fewer, a metric's error is more than a few percent."""
LEAST_ROWS = 8
"""Rows that each held-out part of a small source should have."""
TRAINED, TRAINED_OF_CLASSES = 0.7, 0.6
"""The share of a small source that stays to train on, which goes first. Of classes it may be less,
so that each is held out."""
FEWEST_ROWS = 40
"""With fewer rows, none is taken from training to validate on."""
TOY_STEPS = 300
"""Steps that a toy model takes at least: with fewer, it has learned nothing that can be seen."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Fractions of the training rows, and the rows that they are; 0 holds out none."""

    evaluation: float
    validation: float
    evaluation_rows: int
    validation_rows: int
    train_rows: int
    exact: bool
    """Whether the rows are counted as prep will count them."""
    unseen: tuple[str, ...] = ()
    """Classes that one of the splits lacks, of a source whose rows are all known."""
    epochs: int
    steps: int
    """Optimizer steps, as the defaults of the spec batch rows."""

    @property
    def few_steps(self) -> bool:
        return self.steps < 2 * TOY_STEPS


def propose(
    rows: int, sample: Sequence[Row], data: DataSpec, answer: Answer, *, whole: bool, toy: bool
) -> Shares:
    """For `rows` rows that begin with `sample`; `whole` says whether it has all that can be used.

    A split that `data` names takes no fraction. `toy` is whether a toy model is trained.
    """
    nominal = _nominal(rows)
    evaluation = 0.0 if data.eval else nominal
    validation = nominal if rows >= FEWEST_ROWS and not data.validation else 0.0
    evaluated, validated = round(evaluation * rows), round(validation * rows)
    trained, exact, unseen = max(1, rows - evaluated - validated), False, tuple[str, ...]()
    if whole and (evaluation or validation):
        splits = _KnownRows.of(sample, data, answer)
        evaluation, validation = splits.fractions(bool(evaluation), bool(validation), nominal)
        tried = replace(data, eval_fraction=evaluation, validation_fraction=validation)
        counts = count_splits(
            {"$.data.train": sample},
            tried,
            normalize_label=NORMALIZERS[answer],
            classes=answer == "label",
            seed=_seed(),
        )
        # With rows of other sources, which are not read here, more may be removed as leaked.
        exact = not (data.eval or data.validation)
        evaluated, validated = counts.evaluation, counts.validation
        trained = max(1, counts.train[0])
        unseen = splits.unseen(evaluation, validation) if answer == "label" else ()
    steps_an_epoch = ceil(trained / _rows_a_step())
    epochs = 3 if rows <= 50 * WANTED_ROWS else 1
    if toy:
        epochs = max(epochs, ceil(TOY_STEPS / steps_an_epoch))
    return Shares(
        evaluation=evaluation,
        validation=validation,
        evaluation_rows=evaluated,
        validation_rows=validated,
        train_rows=trained,
        exact=exact,
        unseen=unseen,
        epochs=epochs,
        steps=epochs * steps_an_epoch,
    )


def _nominal(rows: int) -> float:
    """The fraction to hold out for each purpose."""
    if rows < FEWEST_ROWS:
        return 0.2
    if rows < WANTED_ROWS / 2:
        return 0.15
    return 0.1 if rows <= 10 * WANTED_ROWS else float(f"{WANTED_ROWS / rows:.1g}")


def _seed() -> int:
    seed = keys.default("train.seed")
    assert isinstance(seed, int)
    return seed


def _rows_a_step() -> int:
    rows = keys.default("train.per_device_train_batch_size")
    passes = keys.default("train.gradient_accumulation_steps")
    assert isinstance(rows, int)
    assert isinstance(passes, int)
    return rows * passes


_COARSE = tuple(n / 20 for n in range(1, 11))
_FINE = tuple(n / 100 for n in range(1, 51))
_Choice = tuple[float, float]
"""The fractions to evaluate and to validate on."""


@dataclass(frozen=True, kw_only=True)
class _KnownRows:
    """All rows of a source, of which it can be tried what each fraction holds out."""

    classes: bool
    """Whether answers are class labels."""
    labels: Sequence[str]
    evaluated: Mapping[float, frozenset[int]]
    """The rows that each fraction holds out to evaluate on."""
    validated: Mapping[float, frozenset[int]]

    @classmethod
    def of(cls, rows: Sequence[Row], data: DataSpec, answer: Answer) -> "_KnownRows":
        normalize, seed = NORMALIZERS[answer], _seed()
        by = resolve_leakage_by(data, normalize, rows, classes=answer == "label")
        groups = [RowKeys(row, normalize, by).split_group for row in rows]
        none = replace(data, eval_fraction=0.0, validation_fraction=0.0)

        def held_out(spec: DataSpec) -> frozenset[int]:
            return frozenset(n for n, g in enumerate(groups) if split_of(g, spec, seed) != "train")

        fractions = sorted({0.0, *_COARSE, *_FINE})
        return cls(
            classes=answer == "label",
            labels=[normalize(row.answer) for row in rows],
            evaluated={f: held_out(replace(none, eval_fraction=f)) for f in fractions},
            validated={f: held_out(replace(none, validation_fraction=f)) for f in fractions},
        )

    def fractions(self, evaluate: bool, validate: bool, nominal: float) -> _Choice:
        """The fractions that serve best, of round ones if these serve as well."""

        def candidates(some: Sequence[float]) -> list[_Choice]:
            pairs = product(some if evaluate else (0.0,), some if validate else (0.0,))
            return [(one, other) for one, other in pairs if one + other < 1]

        def cost(choice: _Choice) -> tuple[int, ...]:
            return self._cost(choice, evaluate, validate, nominal)

        coarse = min(candidates(_COARSE), key=cost)
        if not any(cost(coarse)[:4]):
            return coarse
        return min((coarse, *candidates(_FINE)), key=cost)

    def _cost(
        self, choice: _Choice, evaluate: bool, validate: bool, nominal: float
    ) -> tuple[int, ...]:
        """What is wrong with a choice, the worst first: splits without a row, rows that training or
        a held-out part lacks, classes that a split lacks, and the distance from the nominal rows.
        """
        total = len(self.labels)
        held = [self.evaluated[choice[0]]] * evaluate + [self.validated[choice[1]]] * validate
        sizes = list(map(len, held))
        trained = total - sum(sizes)
        wanted = max(LEAST_ROWS, round(nominal * total))
        return (
            (trained < 1) + sizes.count(0),
            max(0, ceil((TRAINED_OF_CLASSES if self.classes else TRAINED) * total) - trained),
            sum(max(0, LEAST_ROWS - size) for size in sizes),
            len(self.unseen(*choice)) if self.classes else 0,
            sum(abs(size - wanted) for size in sizes),
        )

    def unseen(self, evaluation: float, validation: float) -> tuple[str, ...]:
        """The labels that one of the splits lacks, although there are rows for all, sorted."""
        held = [each for each in (self.evaluated[evaluation], self.validated[validation]) if each]
        trained = {*range(len(self.labels))}.difference(*held)
        splits = [{self.labels[n] for n in rows} for rows in (trained, *held)]
        return tuple(sorted({*self.labels}.difference(set.intersection(*splits))))

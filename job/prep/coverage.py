"""Finds classes that are missing from some of the splits."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from job import log
from job.prep.leakage import NormalizeLabel
from job.prep.shards import Split, batches, shard_paths
from job.prep.splits import answers_repeat, splits_of
from job.redaction import printable
from job.spec.types import DataSpec

MAX_CLASSES = 1000
"""With more distinct answers, they do not count as classes; this bounds memory."""
_SHOWN_CLASSES, _SHOWN_CHARACTERS = 10, 40


@dataclass(frozen=True, kw_only=True)
class ClassCoverage:
    """Number of rows per class in each split, by normalized label."""

    train: Counter[str]
    held_out: Counter[str]
    validation: Counter[str] | None = None
    """None without a validation split."""

    @property
    def missing_in_train(self) -> list[str]:
        return sorted((self.held_out + (self.validation or Counter())).keys() - self.train.keys())

    @property
    def missing_in_eval(self) -> list[str]:
        return sorted(self.train.keys() - self.held_out.keys())

    @property
    def missing_in_validation(self) -> list[str]:
        return [] if self.validation is None else sorted(self.train.keys() - self.validation.keys())


def class_coverage(
    directory: Path, spec: DataSpec, normalize_label: NormalizeLabel, *, classes: bool
) -> ClassCoverage | None:
    """The classes of the rows in `directory`; None if their answers are not classes.

    They are if `classes` is true, or if most answers repeat.
    """
    counts: dict[Split, Counter[str]] = {split: Counter() for split in splits_of(spec)}
    for split, counted in counts.items():
        for shard in shard_paths(directory, split):
            for batch in batches(shard, ["messages"]):
                for messages in batch.column(0).to_pylist():
                    content = json.loads(messages)[-1]["content"]
                    answer = "".join(part.get("text") or "" for part in content)
                    counted[normalize_label(answer)] += 1
                if len(counted) > MAX_CLASSES:
                    return None
    if not classes and not answers_repeat(sum(counts.values(), Counter()).values()):
        return None
    return ClassCoverage(
        train=counts["train"], held_out=counts["eval"], validation=counts.get("validation")
    )


def warn_missing_classes(coverage: ClassCoverage, spec: DataSpec) -> None:
    """Warns of classes missing from a split."""
    if coverage.missing_in_train:
        log.warn(
            "held-out classes have no training rows and cannot be learned",
            classes=_shorten(coverage.missing_in_train),
            fix="add rows of them"
            + ("" if spec.eval else ", or name the held-out rows in data.eval"),
        )
    if coverage.missing_in_eval:
        log.warn(
            "trained classes have no held-out rows and are not evaluated",
            classes=_shorten(coverage.missing_in_eval),
            fix=_add_rows("eval", named=spec.eval is not None, fraction=spec.eval_fraction),
        )
    if coverage.missing_in_validation:
        named, fraction = spec.validation is not None, spec.validation_fraction
        log.warn(
            "trained classes have no validation rows and do not count in choosing the best step",
            classes=_shorten(coverage.missing_in_validation),
            fix=_add_rows("validation", named=named, fraction=fraction),
        )


def _add_rows(split: Split, *, named: bool, fraction: float) -> str:
    if named:
        return f"add rows of them to data.{split}"
    key = f"data.{split}_fraction"
    return f"raise {key}, which is {fraction:g}, or name a source in data.{split}"


def _shorten(classes: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = [printable(name[:_SHOWN_CHARACTERS]) for name in classes[:_SHOWN_CLASSES]]
    more = len(classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")

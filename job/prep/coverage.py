"""Classes that one of the two splits lacks: what is not trained, and what is not judged."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from job import log
from job.prep.leakage import LabelKey
from job.prep.shards import Split, batches, shards
from job.prep.splits import repeat
from job.redaction import printable

MOST = 1000
"""Different answers beyond which they are taken for no classes, so that memory stays bounded."""
_NAMED, _LETTERS = 10, 40


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Rows of each class in both splits, by the class's normal form."""

    train: Counter[str]
    held_out: Counter[str]

    @property
    def untrained(self) -> list[str]:
        """Classes that are held out and not trained."""
        return sorted(self.held_out.keys() - self.train.keys())

    @property
    def unjudged(self) -> list[str]:
        """Classes that are trained and not held out."""
        return sorted(self.train.keys() - self.held_out.keys())


def coverage(directory: Path, label_key: LabelKey, *, classes: bool) -> Coverage | None:
    """The classes of the rows in `directory`; None where their answers are no classes.

    `classes`: whether they are said to be; else they are where they repeat.
    """
    found: dict[Split, Counter[str]] = {"train": Counter(), "eval": Counter()}
    for split, counted in found.items():
        for shard in shards(directory, split):
            for batch in batches(shard, ["messages"]):
                for messages in batch.column(0).to_pylist():
                    content = json.loads(messages)[-1]["content"]
                    counted[label_key("".join(part.get("text") or "" for part in content))] += 1
                if len(counted) > MOST:
                    return None
    if not classes and not repeat((found["train"] + found["eval"]).values()):
        return None
    return Coverage(train=found["train"], held_out=found["eval"])


def tell(found: Coverage, *, fraction: float | None) -> None:
    """Warns of the classes that a split lacks; `fraction` is held back where there is one."""
    if found.untrained:
        log.warn(
            "classes of held-out rows have no row to train on, so that they cannot be learned",
            classes=named(found.untrained),
            fix="add rows of them"
            + ("" if fraction is None else ", or name the held-out rows in data.eval"),
        )
    if found.unjudged:
        log.warn(
            "classes have no held-out row, so that they are not judged",
            classes=named(found.unjudged),
            fix="add rows of them to data.eval"
            if fraction is None
            else f"raise data.eval_fraction, which is {fraction:g}, or name a source in data.eval",
        )


def named(classes: list[str]) -> str:
    """The names of a few, and how many more there are."""
    shown = [printable(name[:_LETTERS]) for name in classes[:_NAMED]]
    more = len(classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")

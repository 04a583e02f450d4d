"""Adds up the results of all chunks, and writes the files that list them."""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from job.prep.chunks import ChunkResult
from job.prep.leakage import LeakageBy
from job.prep.prepared_data import REJECTS
from job.prep.rows import Reject
from job.prep.shards import Split, shard_paths
from job.prep.splits import splits_of
from job.prep.statistics import Statistics
from job.prep.streaming import CHUNKS
from job.redaction import as_json
from job.spec.types import DataSpec

SHOWN_REJECTS = 5
MAX_REASONS = 50


@dataclass(kw_only=True)
class Totals:
    """The sums over all chunks; sources are keyed by label: `train`, `train[1]`, `eval`,
    `validation`."""

    statistics: dict[Split, Statistics]
    """Of each split of the spec."""
    reject_reasons: Counter[str] = field(default_factory=Counter)
    first_rejects: list[Reject] = field(default_factory=list)
    ignored: dict[str, Counter[str]] = field(default_factory=dict)
    """Rows by ignored column or key, of each source."""
    junk_members: Counter[str] = field(default_factory=Counter)
    """Of archives, by source."""
    leakage_by: dict[str, LeakageBy] = field(default_factory=dict)
    """Of each source that is compared with held-out rows: those of training and validation."""

    @classmethod
    def collect(
        cls, results: Iterable[tuple[str, ChunkResult]], workspace: Path, spec: DataSpec
    ) -> "Totals":
        """Consumes the results, each with its source's label; writes `rejects.jsonl` and
        `chunks.jsonl`."""
        totals = cls(statistics={split: Statistics() for split in splits_of(spec)})
        with ExitStack() as files:
            rejects = files.enter_context((workspace / REJECTS).open("w", encoding="utf-8"))
            chunks = files.enter_context((workspace / CHUNKS).open("w", encoding="utf-8"))
            for label, result in results:
                totals.add(label, result)
                if result.chunk is not None:
                    chunks.write(json.dumps(result.chunk.to_json()) + "\n")
                for reject in result.rejects:
                    rejects.write(as_json(asdict(reject)) + "\n")
        return totals

    def add(self, label: str, result: ChunkResult) -> None:
        if label != "eval":
            self.leakage_by[label] = result.leakage_by
        for split, statistics in result.statistics.items():
            self.statistics[split].merge(statistics)
        self.ignored.setdefault(label, Counter()).update(result.ignored)
        self.junk_members[label] += result.junk_members
        for reject in result.rejects:
            self.reject_reasons[reject.reason.split(":")[0]] += 1
        room = SHOWN_REJECTS - len(self.first_rejects)
        self.first_rejects += result.rejects[:room]

    @property
    def rejected(self) -> int:
        return self.reject_reasons.total()

    def rows(self, split: Split) -> int:
        """Rows of a split before leaked ones are removed; 0 if the spec does not have the split."""
        return self.statistics[split].rows if split in self.statistics else 0

    @property
    def train_rows(self) -> int:
        """Before leaked rows are removed."""
        return self.rows("train")

    @property
    def eval_rows(self) -> int:
        return self.rows("eval")

    @property
    def validation_rows(self) -> int:
        """Before leaked rows are removed; 0 without a validation split."""
        return self.rows("validation")

    @property
    def all_rows(self) -> int:
        """Rows of all splits, without rejects."""
        return sum(each.rows for each in self.statistics.values())

    def validation_by(self, directory: Path) -> dict[Path, LeakageBy]:
        """What makes duplicates of the rows of each validation shard in `directory`.

        A validation source may be too small to show that answers repeat, so it is also compared by
        image if any training source is.
        """
        by = dict(self.leakage_by)
        if "validation" in by:
            found: LeakageBy = "image" if "image" in by.values() else by["validation"]
            return dict.fromkeys(shard_paths(directory, "validation"), found)
        if set(by) == {"train"}:
            return dict.fromkeys(shard_paths(directory, "validation"), by["train"])
        return {
            shard: each
            for label, each in by.items()
            for shard in shard_paths(directory, "validation", int(label[len("train[") : -1]))
        }

    @property
    def most_frequent_reasons(self) -> dict[str, int]:
        return dict(self.reject_reasons.most_common(MAX_REASONS))

    @property
    def compares_answers(self) -> bool:
        """Whether rows with images are compared by more than their images."""
        by = set(self.leakage_by.values())
        return bool(self.statistics["train"].images) and by != {"image"}

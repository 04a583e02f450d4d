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
from job.prep.shards import SPLITS, Split
from job.prep.statistics import Statistics
from job.prep.streaming import CHUNKS
from job.redaction import as_json

SHOWN_REJECTS = 5
MAX_REASONS = 50


@dataclass(kw_only=True)
class Totals:
    """The sums over all chunks; sources are keyed by label: `train`, `train[1]`, `eval`."""

    statistics: dict[Split, Statistics] = field(
        default_factory=lambda: {split: Statistics() for split in SPLITS}
    )
    reject_reasons: Counter[str] = field(default_factory=Counter)
    first_rejects: list[Reject] = field(default_factory=list)
    ignored: dict[str, Counter[str]] = field(default_factory=dict)
    """Rows by ignored column or key, of each source."""
    junk_members: Counter[str] = field(default_factory=Counter)
    """Of archives, by source."""
    leakage_by: dict[str, LeakageBy] = field(default_factory=dict)
    """Of each training source."""

    @classmethod
    def collect(cls, results: Iterable[tuple[str, ChunkResult]], workspace: Path) -> "Totals":
        """Consumes the results, each with its source's label; writes `rejects.jsonl` and
        `chunks.jsonl`."""
        totals = cls()
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

    @property
    def train_rows(self) -> int:
        """Before leaked rows are removed."""
        return self.statistics["train"].rows

    @property
    def eval_rows(self) -> int:
        return self.statistics["eval"].rows

    @property
    def most_frequent_reasons(self) -> dict[str, int]:
        return dict(self.reject_reasons.most_common(MAX_REASONS))

    @property
    def compares_answers(self) -> bool:
        """Whether rows with images are compared by more than their images."""
        by = set(self.leakage_by.values())
        return bool(self.statistics["train"].images) and by != {"image"}

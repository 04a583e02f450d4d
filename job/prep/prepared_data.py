"""What prep leaves in a directory, and how its rows are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from job.prep.rows import Row
from job.prep.shards import Rows, Split
from job.prep.streaming import FullShards, StreamedRows

REJECTS, STATS = "rejects.jsonl", "stats.json"


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Prep's output in `directory`: shards, `stats.json` and `rejects.jsonl`."""

    directory: Path
    train_rows: int
    """Rows of an epoch; in a mixture, rows may repeat or be left out."""
    eval_rows: int
    rejected_rows: int
    leaked_rows: int
    """Training rows that were removed because they duplicate a held-out row."""
    full_shards: FullShards | None = None
    """Where training rows with image bytes come from, if prep does not store these."""

    def rows(self, split: Split) -> Sequence[Row]:
        if split == "train" and self.full_shards is not None:
            return StreamedRows(self.full_shards)
        return Rows.of(self.directory, split)

    def measured_rows(self) -> Sequence[Row]:
        """The training rows with the sizes of their images, but not always their bytes."""
        return Rows.of(self.directory, "train")

"""The output of prep in a directory, and access to its rows."""

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
    validation_rows: int | None = None
    """None without a validation split (`data.validation`, `data.validation_fraction`)."""
    leaked_validation_rows: int = 0
    """Validation rows that were removed because they duplicate a row to evaluate on."""
    full_shards: FullShards | None = None
    """Rebuilds training rows with image bytes, if prep does not store them."""

    def rows(self, split: Split) -> Sequence[Row]:
        if split == "train" and self.full_shards is not None:
            return StreamedRows(self.full_shards)
        return Rows.of(self.directory, split)

    @property
    def validation(self) -> Sequence[Row] | None:
        """The rows to validate on during training; None without a validation split."""
        return None if self.validation_rows is None else self.rows("validation")

    def measured_rows(self) -> Sequence[Row]:
        """The training rows with image sizes but, if streaming, without image bytes."""
        return Rows.of(self.directory, "train")

"""Records of stages and of the run, as they are stored at the output."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from job import storage
from job.errors import InputError
from job.redaction import as_json, redacted
from job.storage.digests import FileDigest

THROUGHPUT = (
    "tokens",
    "tokens_per_second",
    "seconds",
    "data_wait_seconds",
    "data_wait_share",
    "peak_memory_bytes",
    "processes",
    "rows_a_step",
)
"""What of the training's summary readers look for first."""

STAGES = ".stages"
"""The folder of an output that holds a marker for each finished stage."""

Status = Literal["running", "succeeded", "failed", "preempted"]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A finished stage: what it was made from, what it left, and when."""

    name: str
    fingerprint: str
    started: str
    seconds: float
    files: tuple[FileDigest, ...]
    """Paths relative to the output."""
    summary: dict[str, Any]
    """What later stages and readers need of it without its files."""

    def to_json(self) -> dict[str, Any]:
        """As it is stored: the summary holds no secret; the files' paths stay what they are."""
        return {**asdict(self), "summary": redacted(self.summary)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "StageRecord":
        return cls(
            name=str(value["name"]),
            fingerprint=str(value["fingerprint"]),
            started=str(value["started"]),
            seconds=float(value["seconds"]),
            files=tuple(FileDigest.from_json(file) for file in value["files"]),
            summary=dict(value["summary"]),
        )


def read_stage(uri: str) -> StageRecord:
    """The record that a stage's marker at `uri` holds.

    Raises MissingInputError if there is none, and InputError if it is cut or was changed.
    """
    try:
        return StageRecord.from_json(json.loads(storage.read_bytes(uri)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            uri,
            f"is no record of a stage; it is cut or was changed: {reason}",
            fix="run the job again: it makes the stage of an unreadable marker anew",
        ) from error


@dataclass(kw_only=True)
class RunRecord:
    """`run.json`: the state of the whole run, rewritten as it goes."""

    name: str
    command: str
    status: Status
    started: str
    finished: str | None = None
    stage: str | None = "open"
    """What is under way, or where the run ended: `open` before the first stage."""
    stages: dict[str, StageRecord] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    """When each stage of this run started, was skipped, done, stopped or failed, in order."""
    metrics: dict[str, Any] = field(default_factory=dict)
    throughput: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What did not go as asked although the results are whole."""
    error: list[dict[str, Any]] | None = None

    def add(self, stage: StageRecord) -> None:
        """Enters a finished stage, and what readers look for first of its summary."""
        self.stages[stage.name] = stage
        summary = stage.summary
        if stage.name == "prep":
            self.rows.update(summary["rows"])
        elif stage.name == "baseline":
            self.metrics["baseline"] = summary["metrics"]
        elif stage.name == "eval":
            self.metrics["final"] = summary["metrics"]
        elif stage.name == "train":
            self.rows["dropped_over_max_length"] = summary["dropped_rows"]
            for key in THROUGHPUT:
                self.throughput[key] = summary[key]

    def to_text(self) -> str:
        """As it is stored: whatever errors, URIs and warnings hold, no secret."""
        return as_json(asdict(self), indent=2) + "\n"

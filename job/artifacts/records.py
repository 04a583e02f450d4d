"""The records of a run and its stages, as stored at the output."""

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
    "tflops",
    "mfu",
    "seconds",
    "data_wait_seconds",
    "data_wait_share",
    "peak_memory_bytes",
    "processes",
    "rows_a_step",
)
"""Keys of the training summary that `run.json` repeats under `throughput`."""

PREDICTIONS = "eval/predictions.jsonl"
"""The trained model's answers, with the ids of the held-out rows."""

STAGES = ".stages"
"""The folder with the markers of complete stages."""

Status = Literal["running", "succeeded", "failed", "preempted"]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A complete stage: its inputs, its files, and when it ran; stored as JSON in its marker."""

    name: str
    fingerprint: str
    started: str
    seconds: float
    files: tuple[FileDigest, ...]
    """Paths relative to the output."""
    summary: dict[str, Any]
    """Results that later stages and readers need without reading the files."""

    def to_json(self) -> dict[str, Any]:
        """The stored form: secrets in the summary are redacted, paths stay unchanged."""
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

    @classmethod
    def parse(cls, marker: bytes) -> "StageRecord":
        """Parses a marker. Raises ValueError if it is truncated or was changed."""
        try:
            return cls.from_json(storage.parse_json(marker))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def read_stage(uri: str) -> StageRecord:
    """The record in the marker at `uri`.

    Raises MissingInputError if there is none, and InputError if it is unreadable.
    """
    try:
        return StageRecord.parse(storage.read_bytes(uri))
    except ValueError as error:
        raise InputError(
            uri,
            f"is not a valid stage record: truncated or modified: {error}",
            fix="run the job again: it reruns a stage whose marker is unreadable",
        ) from error


@dataclass(kw_only=True)
class RunRecord:
    """`run.json`: the state of the whole run, rewritten as the run proceeds."""

    name: str
    command: str
    status: Status
    started: str
    finished: str | None = None
    stage: str | None = "open"
    """The stage that is running, or in which the run ended; `open` before the first."""
    stages: dict[str, StageRecord] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    """Stages started, skipped, completed, stopped or failed, with times, in order."""
    metrics: dict[str, Any] = field(default_factory=dict)
    throughput: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] | None = None
    """The training's validations, and the step that is kept; None without validation."""
    rows: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """Requests of the spec that were not met although the results are complete, and doubts about
    these."""
    error: list[dict[str, Any]] | None = None

    def add(self, stage: StageRecord) -> None:
        """Adds a complete stage, and the main figures of its summary."""
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
            for key in THROUGHPUT:  # earlier versions recorded fewer
                self.throughput[key] = summary.get(key)
            self.validation = summary.get("validation")
        elif stage.name == "reinforce":
            self.validation = summary.get("validation") or self.validation

    def to_text(self) -> str:
        """The stored form, with secrets in errors, URIs and warnings redacted."""
        return as_json(asdict(self), indent=2) + "\n"

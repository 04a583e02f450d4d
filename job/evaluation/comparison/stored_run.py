"""Reads a run's results from its output, in whatever state the run is."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job import storage
from job.artifacts.nesting import RESOLVED, RUN, run_containing
from job.artifacts.records import PREDICTIONS, StageRecord
from job.errors import InputError, JobError, MissingInputError
from job.evaluation.report import facts
from job.evaluation.report.samples import PredictionRecord
from job.spec.answer_kinds import Answer
from job.spec.parse import decode, parse
from job.storage.digests import fingerprint

HELD_OUT = "data/eval-"
"""The beginning of the paths of the held-out rows' shards."""
_CHECKPOINTS = "checkpoints"
_COMPLETE = re.compile(r"step-(\d+)/manifest\.json")
_STAGES = ("prep", "baseline", "train", "reinforce", "eval", "export")
_MISSING = {
    "prep": "prepared rows",
    "baseline": "metrics before training",
    "train": "a finished training",
    "reinforce": "a finished reinforcement",
    "eval": "metrics after training",
    "export": "exported weights",
}


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """What a comparison shows of one run; whatever the run does not have is empty."""

    letter: str
    """A, B, …: its name in the comparison."""
    uri: str
    name: str
    status: str
    """`running`, `succeeded`, `failed` or `preempted`."""
    stage: str | None
    """The stage that is running, or in which the run ended."""
    started: str
    finished: str | None
    settings: Mapping[str, object]
    """The resolved spec's values by dotted key."""
    stages: Mapping[str, StageRecord]
    metrics: Mapping[str, Mapping[str, float]]
    """`baseline` and `final`, by metric."""
    rows: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, Any]
    machine: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    """Training and validation over steps."""
    validation: Mapping[str, Any]
    """The training's summary of its validations; of an unfinished one, the best step so far."""
    answers: Sequence[PredictionRecord]
    """After training."""
    lacks: tuple[str, ...]
    """What the run does not have, each with its reason."""

    @property
    def kind(self) -> Answer | None:
        """The kind of answers; None if the spec is unreadable."""
        return self.settings.get("eval.answer")  # type: ignore[return-value]

    @property
    def train(self) -> Mapping[str, Any]:
        """The summary of the training."""
        return self.stages["train"].summary if "train" in self.stages else {}

    @property
    def held_out_shards(self) -> str | None:
        """A digest of the held-out rows with their images; None without prepared rows."""
        if "prep" not in self.stages:
            return None
        files = [each for each in self.stages["prep"].files if each.path.startswith(HELD_OUT)]
        return fingerprint([(each.path, each.sha256) for each in files])


def read_run(uri: str, letter: str) -> StoredRun:
    """The run at `uri`.

    Raises InputError if there is no run, its `run.json` is unreadable, or access is denied.
    """
    record = _read_record(uri)
    reader = _Reader(uri, record)
    history, answers = reader.history(), reader.lines("eval", PREDICTIONS)
    return StoredRun(
        letter=letter,
        uri=uri,
        name=str(record.get("name", "")),
        status=str(record.get("status", "unknown")),
        stage=record.get("stage"),
        started=str(record.get("started", "")),
        finished=record.get("finished"),
        settings=reader.settings,
        stages=reader.stages,
        metrics={
            name: {k: v for k, v in _mapping(values).items() if isinstance(v, int | float)}
            for name, values in _mapping(record.get("metrics")).items()
        },
        rows=_mapping(record.get("rows")),
        inputs={name: _mapping(each) for name, each in _mapping(record.get("inputs")).items()},
        versions=_mapping(record.get("versions")),
        machine=_mapping(record.get("machine")),
        history=history,
        validation=reader.validation,
        answers=answers,
        lacks=tuple(reader.lacks),
    )


def _read_record(uri: str) -> Mapping[str, Any]:
    path = storage.join(uri, RUN)
    if storage.name(uri) == RUN:
        raise InputError(uri, "is not a run", fix=f"name the run itself: {storage.parent(uri)}")
    try:
        record = storage.parse_json(storage.read_bytes(path))
    except MissingInputError as error:
        run = run_containing(uri)
        fix = f"name the run itself: {run}" if run else "name the output of a run (output.uri)"
        raise InputError(uri, f"is not a run: it has no {RUN}", fix=fix) from error
    except ValueError as error:
        raise InputError(
            path,
            f"is truncated or was changed: {error}",
            fix="run its spec again: it rewrites the file and repeats no finished stage",
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("stages"), dict):
        raise InputError(path, "is not the record of a run", fix="name the output of a run")
    return record


class _Reader:
    """Reads a run's files by its record, and notes what is not there."""

    def __init__(self, uri: str, record: Mapping[str, Any]) -> None:
        """Raises InputError if a stage's entry in the record is invalid."""
        self._uri = uri
        self.lacks: list[str] = []
        self.validation: Mapping[str, Any] = {}
        self.stages: dict[str, StageRecord] = {}
        for name, value in record["stages"].items():
            try:
                self.stages[name] = StageRecord.from_json(value)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    storage.join(uri, RUN),
                    f"the stage {name} is invalid: {type(error).__name__}: {error}",
                    fix="run its spec again: it rewrites the file",
                ) from error
        self.settings = self._settings()
        self._note_missing_stages(record)

    def _settings(self) -> Mapping[str, object]:
        path = storage.join(self._uri, RESOLVED)
        try:
            values = parse(decode(storage.read_bytes(path), path), path).values
        except MissingInputError:
            self.lacks.append(f"settings: {RESOLVED} is missing")
        except JobError as error:
            if isinstance(error, InputError):
                raise
            self.lacks.append(f"settings: {error.problems[0].message}")
        else:
            return dict(facts.leaves(values, ""))
        return {}

    def history(self) -> Sequence[Mapping[str, Any]]:
        """From the finished training, or else up to its newest checkpoint."""
        if "train" in self.stages:
            self.validation = self.stages["train"].summary.get("validation") or {}
            return self.lines("train", "train/history.jsonl")
        folder = storage.join(self._uri, _CHECKPOINTS)
        found = (_COMPLETE.fullmatch(entry.path) for entry in storage.list_files(folder))
        steps = [int(match[1]) for match in found if match is not None]
        for step in sorted(steps, reverse=True):
            try:
                path = storage.join(folder, f"step-{step}/trainer_state.json")
                state = storage.parse_json(storage.read_bytes(path))
                entries = state["log_history"]
            except (MissingInputError, ValueError, KeyError, TypeError):
                continue
            if state.get("best_global_step") is not None:
                self.validation = {
                    "metric": self.settings.get("train.metric_for_best_model"),
                    "best_step": state["best_global_step"],
                    "best": state.get("best_metric"),
                }
            self.lacks.append(f"curves after the checkpoint of step {step:,}")
            return tuple(each for each in entries if isinstance(each, dict))
        return ()

    def lines(self, stage: str, path: str) -> tuple[Mapping[str, Any], ...]:
        """The lines of a stage's JSON Lines file, checked against the record."""
        record = self.stages.get(stage)
        file = next((each for each in record.files if each.path == path), None) if record else None
        if file is None:
            if record is not None:
                self.lacks.append(f"{path}: the run did not write it")
            return ()
        try:
            data = storage.read_bytes(storage.join(self._uri, path))
        except MissingInputError:
            self.lacks.append(f"{path}: is missing")
            return ()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            self.lacks.append(f"{path}: differs from its record; it is damaged, or was rewritten")
            return ()
        return tuple(json.loads(line) for line in data.splitlines())

    def _note_missing_stages(self, record: Mapping[str, Any]) -> None:
        """Says why stages are missing: the run has not come so far, failed, or skips them."""
        absent = [stage for stage in _STAGES if stage not in self.stages]
        if "baseline" in absent and self.settings.get("eval.baseline") is False:
            absent.remove("baseline")
            self.lacks.append(f"{_MISSING['baseline']}: eval.baseline is false")
        if not any(key.startswith("reinforce.") for key in self.settings) and "reinforce" in absent:
            absent.remove("reinforce")  # the spec asks for none
        if not absent:
            return
        status, stage = record.get("status"), record.get("stage")
        where = f" in {stage}" if stage else ""
        errors = record.get("error")
        reason = {
            "running": f"it is running{where}, or was killed there",
            "failed": f"it failed{where}",
            "preempted": f"it was stopped{where}",
        }.get(str(status), f"its command was {record.get('command', 'another')}")
        if isinstance(errors, list) and errors and isinstance(errors[0], dict):
            reason += f": {errors[0].get('field')}: {errors[0].get('message')}"
        self.lacks.append(f"{', '.join(_MISSING[stage] for stage in absent)}: {reason}")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

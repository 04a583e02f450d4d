"""Runs at an output, stored by the job's own code around made-up results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.artifacts import provenance
from job.artifacts.output import Output
from job.artifacts.records import RunRecord
from job.evaluation.evaluate import Evaluation, Prediction, write
from job.evaluation.scoring import score_answers
from job.prep.rows import Message, Part, Row
from job.prep.shards import ShardWriter
from job.redaction import as_json
from job.spec.load import dump_resolved, load_spec
from tests.jobs import ROOT
from tests.reports import png, results

LABELS = tuple(f"x^{{{number}}}" for number in range(8))
STAGES = ("prep", "baseline", "train", "eval")


@dataclass(frozen=True, kw_only=True)
class Made:
    """What is different about a run."""

    sets: Sequence[str] = ()
    labels: Sequence[str] = LABELS
    first_row: int = 0
    """The number in the first row's id."""
    wrong: Sequence[int] = ()
    """The rows, by their number, that are answered wrongly after training."""
    said: str = "y"
    """The wrong answer."""
    losses: Sequence[float] = tuple(6 / step for step in range(1, 41))
    validation: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Metrics by step, `eval_loss` and the like."""
    validated: Mapping[str, Any] | None = None
    """The training's summary of its validations."""
    stages: Sequence[str] = STAGES
    versions: Mapping[str, str] = field(default_factory=dict)


def store(uri: str, place: Path, made: Made = Made()) -> None:
    """Stores the run at `uri`; with fewer than all stages it has failed in the next one."""
    text = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
    loaded = load_spec(text, "latex.yaml", [*made.sets, f"output.uri={uri}"], environ={})
    run = RunRecord(name=loaded.spec.name, command="eval", status="running", started="2026-01-02")
    run.started = "2026-01-02T03:04:05Z"
    run.versions = {**provenance.versions(), **made.versions}
    run.inputs = {"model": {"uri": "builtin://ernie-vl-tiny", "digest": "d" * 64}}
    output = Output(uri=uri, workdir=place, run=run)
    output.acquire()
    output.write_sbom("{}")
    output.start_run(dump_resolved(loaded))
    makers = {"prep": _prep, "baseline": _baseline, "train": _train, "eval": _eval}
    for stage in made.stages:
        folder = output.stages.local.create(stage)
        summary = makers[stage](folder, made)
        run.add(output.stages.publish(stage, f"{stage} of {uri}", run.started, 2.5, summary))
    if len(made.stages) < len(STAGES):
        run.status, run.stage = "failed", STAGES[len(made.stages)]
        run.finished = "2026-01-02T04:05:06Z"
        run.error = [{"field": "memory", "message": "the GPU is full", "value": None, "fix": None}]
        output.save_run()
    else:
        run.stage = None
        output.finish_run(complete=True)
    output.release()


def _rows(made: Made) -> list[Row]:
    return [
        Row(
            id=f"rows.jsonl:{number}",
            messages=(
                Message(role="user", parts=(Part(image=0), Part(text="Read it."))),
                Message(role="assistant", parts=(Part(text=label),)),
            ),
            images=(png(number),),
        )
        for number, label in enumerate(made.labels, start=made.first_row)
    ]


def _prep(folder: Path, made: Made) -> dict[str, Any]:
    (folder / "data").mkdir()
    shard = ShardWriter(folder / "data" / "eval-00000.arrow")
    for row in _rows(made):
        shard.write(row, [], 0)
    shard.close()
    return {"rows": {"train": 40, "eval": len(made.labels), "rejected": 0, "leaked": 0}}


def _baseline(folder: Path, made: Made) -> dict[str, Any]:
    return _evaluate(
        folder, made, ["y"] * len(made.labels), 6.0, "baseline", "baseline.predictions"
    )


def _eval(folder: Path, made: Made) -> dict[str, Any]:
    answers = [made.said if n in made.wrong else label for n, label in enumerate(made.labels)]
    return _evaluate(folder, made, answers, 0.5 + len(made.wrong) / 10, "final", "predictions")


def _evaluate(
    folder: Path, made: Made, answers: Sequence[str], loss: float, name: str, file: str
) -> dict[str, Any]:
    wanted = ["exact_match", "cer"]
    scores = score_answers("latex", answers, made.labels, wanted)
    rows = _rows(made)
    predictions = tuple(
        Prediction(
            id=row.id, row=number, turn=1, asked=[each.to_json() for each in row.prompt],
            label=row.answer, prediction=answer, cut_short=False, score=score,
        )
        for number, (row, answer, score) in enumerate(
            zip(rows, answers, scores.scores, strict=True)
        )
    )  # fmt: skip
    evaluation = Evaluation(
        metrics={"loss": loss, "rows": len(rows), **scores.metrics}, predictions=predictions,
        seconds=1.0, tokens_per_second=10.0, rows=len(rows), answer="latex", turns="last",
        max_new_tokens=40, cannot_be_right=0,
    )  # fmt: skip
    write(evaluation, folder, name, f"{file}.jsonl")
    return evaluation.summary()


def _train(folder: Path, made: Made) -> dict[str, Any]:
    (folder / "train").mkdir()
    lines: list[dict[str, Any]] = []
    for step, loss in enumerate(made.losses, start=1):
        lines.append({"step": step, "loss": loss, "learning_rate": 1e-3})
        if step in made.validation:
            lines.append({"step": step, "epoch": step / 10, **made.validation[step]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train" / "history.jsonl").write_text(text)
    summary = {**results().stages["train"].summary, "seconds": 12.5, "steps": len(made.losses)}
    if made.validated is not None:
        summary["validation"] = dict(made.validated)
    assert json.loads(as_json(summary)) is not None
    return summary

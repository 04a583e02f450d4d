"""One run on S3 that everybody watches: logs for machines, Prometheus, Kubeflow, trackers."""

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from job import storage
from job.telemetry import kubeflow
from tests import s3 as s3_server
from tests.conftest import S3
from tests.jobs import job, sets, small_run, start
from tests.servers import serving

STAGES = ["prep", "baseline", "train", "eval", "card", "report"]
VALIDATION = sets(
    {
        "data.validation_fraction": 0.2,
        "train.eval_strategy": "steps",
        "train.eval_steps": 2,
        "train.metric_for_best_model": "eval_cer",
    }
)
TRACKERS = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


# The job, which ends no sooner than Prometheus has seen its stage eval, however short that is.
SEEN_IN_EVAL = """
import sys, time
from pathlib import Path
from job.cli import app
from job.pipeline.stages import Stages

seen, evaluate, end = Path(sys.argv.pop(1)), Stages.eval, time.monotonic() + 240

def until_seen(stages, directory):
    summary = evaluate(stages, directory)
    while not seen.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return summary

Stages.eval = until_seen
app.main()
"""


@dataclass
class Watched:
    """A finished run, with what was seen of it."""

    output: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    scraped: set[str] = field(default_factory=set)
    told: list[dict[str, Any]] = field(default_factory=list)
    file: str = ""


@pytest.fixture(scope="module")
def watched(
    s3_process: s3_server.S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    place = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_process.environ.items():
            patch.setenv(name, value)
        bucket = f"watched-{os.urandom(4).hex()}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        found = Watched(output=f"s3://{bucket}/out")
        [port] = s3_server.free_ports(1)
        (place / "token").write_text("pods-token")

        def take(path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
            found.told.append(json.loads(body)["trainerStatus"])
            return 200, "{}"

        with serving(take) as trainer:
            arguments = small_run(
                found.output,
                *("--set", f"train.report_to={TRACKERS}"),
                *("--set", f"runtime.metrics_port={port}"),
                *("--set", f"runtime.metrics_file={place / 'job.prom'}"),
                *VALIDATION,
                cache=place / "cache",
            )
            environ = {kubeflow.URL: trainer, kubeflow.TOKEN: str(place / "token")}
            with (place / "log").open("w") as log:
                process = start(
                    *(str(place / "seen"), "--log-format=json", "eval", *arguments[1:]),
                    environ=environ,
                    err=log,
                    code=SEEN_IN_EVAL,
                )
                client = httpx.Client(base_url=f"http://127.0.0.1:{port}")
                while process.poll() is None:
                    time.sleep(0.1)
                    try:
                        text = client.get("/metrics").text
                    except httpx.TransportError:
                        continue
                    found.scraped |= {line.partition("} ")[0] for line in text.splitlines()}
                    if 'stage="eval"' in text:
                        (place / "seen").touch()
        said = (place / "log").read_text()
        assert process.returncode == 0, said
        found.lines = [json.loads(line) for line in said.splitlines()]
        found.file = (place / "job.prom").read_text()
        yield found


def test_every_line_of_a_stage_names_it_and_steps_have_loss_and_speed(watched: Watched) -> None:
    stages = [line["stage"] for line in watched.lines if "stage" in line]
    assert list(dict.fromkeys(stages)) == STAGES
    steps = [line for line in watched.lines if line["event"] == "train"]
    assert [(line["step"], line["step_total"]) for line in steps] == [(n, 4) for n in (1, 2, 3, 4)]
    for line in steps:
        assert line["stage"] == "train"
        assert line["loss"] > 0
        assert line["tokens_per_second"] > 0
        assert line["memory_bytes"] > 2**20


def test_every_validation_is_told_with_the_best_so_far_wherever_steps_are(watched: Watched) -> None:
    events = [line for line in watched.lines if line["event"] == "validation"]
    told = [line for line in events if "step" in line]
    assert [line["step"] for line in told] == [2, 4]
    for line in told:
        assert line["eval_loss"] > 0
        assert line["best_step"] in (2, 4)
        assert line["best_eval_cer"] <= line["eval_cer"]
    best, last = told[-1]["best_eval_cer"], told[-1]["eval_cer"]
    named = 'finetune_job_validation{name="latex"'
    assert f'{named},when="last",metric="cer"}} {last!r}' in watched.file
    assert f'{named},when="best",metric="cer"}} {best!r}' in watched.file
    metrics = {metric["name"]: metric["value"] for metric in watched.told[-1]["metrics"]}
    assert float(metrics["eval_cer"]) == last
    [trained] = [line for line in watched.lines if line["event"] == "trained"]
    assert (trained["best_eval_cer"], trained["last_eval_cer"]) == (best, last)
    report = storage.read_text(f"{watched.output}/report.html")
    assert "Validated 2 times on" in report
    assert "best: " in report


def test_prometheus_sees_the_run_pass_and_its_end(watched: Watched) -> None:
    assert 'finetune_job_stage{name="latex",stage="eval"' in watched.scraped
    assert 'finetune_job_loss{name="latex"' in watched.scraped
    assert 'finetune_job_state{name="latex",state="succeeded"} 1.0' in watched.file
    assert 'finetune_job_eval{name="latex",when="final",metric="cer"}' in watched.file


def test_the_trainer_hears_of_progress_up_to_the_end(watched: Watched) -> None:
    percentages = [told["progressPercentage"] for told in watched.told]
    assert percentages == sorted(percentages)
    assert (percentages[0], percentages[-1]) == (0, 100)
    metrics = {metric["name"]: metric["value"] for metric in watched.told[-1]["metrics"]}
    assert metrics["stage"] == "succeeded"
    assert float(metrics["loss"]) > 0


def test_run_json_tells_the_events_of_stages_in_order(watched: Watched) -> None:
    events = json.loads(storage.read_text(f"{watched.output}/run.json"))["events"]
    assert [(event["stage"], event["event"]) for event in events] == [
        (stage, event) for stage in STAGES for event in ("started", "done")
    ]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert all(event["seconds"] > 0 for event in events if event["event"] == "done")


def test_tensorboard_reads_its_events_from_the_bucket(watched: Watched, tmp_path: Path) -> None:
    _installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    storage.download_tree(f"{watched.output}/logs", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert losses[-1].value < losses[0].value
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]
    assert [event.step for event in events.Scalars("eval/cer")] == [2, 4]


@pytest.mark.slow
def test_mlflow_and_wandb_read_their_runs_from_the_bucket(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed("mlflow")
    _installed("wandb")
    arguments = small_run(
        s3.uri("out"),
        *("--set", "train.report_to=[mlflow, wandb]"),
        *("--set", f"train.logging_dir={s3.uri('elsewhere')}"),
        *VALIDATION,
        cache=tmp_path / "cache",
    )
    done = job("train", *arguments[1:])
    assert done.code == 0, done.err
    logs = tmp_path / "logs"
    storage.download_tree(s3.uri("elsewhere"), logs)

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(logs / "mlflow").as_uri())
    [run] = client.search_runs(["0"])
    assert run.info.run_name == "latex"
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]

    history = client.get_metric_history(run.info.run_id, "eval_loss")
    assert [metric.step for metric in history] == [2, 4]

    [synced_later] = logs.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in synced_later.read_bytes()
    assert b"eval/loss" in synced_later.read_bytes()


def _installed(tracker: str) -> None:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed: make test")

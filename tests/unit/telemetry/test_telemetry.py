"""What a running job tells: in Prometheus' format, to Kubeflow Trainer, in lines for machines."""

import json
import math
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import jsonschema
import pytest
import yaml

from job import log
from job.errors import SpecError
from job.spec.load import load_spec
from job.spec.types import RuntimeSpec
from job.telemetry import Status, StatusReporter, Step, Validation, kubeflow, prometheus
from job.telemetry.status import Snapshot
from tests.jobs import ROOT
from tests.s3 import free_ports
from tests.servers import serving

STEP = Step(
    step=30,
    steps=40,
    epoch=0.75,
    loss=1.25,
    learning_rate=2e-4,
    grad_norm=0.5,
    tokens_per_second=1234.5,
    data_wait_seconds=0.25,
    data_wait_share=0.5,
    memory_bytes=2**30,
    seconds=12.0,
    left_seconds=4.2,
)
METRICS = {"baseline": {"loss": 6.0, "cer": 1.5}}
SAMPLE = re.compile(r'([a-z_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*\}) (\S+)')
"""A line of the text format: a name, labels, a number."""


def runtime(*sets: str) -> RuntimeSpec:
    text = (ROOT / "specs/latex.yaml").read_text()
    return load_spec(text, "latex.yaml", [f"runtime.{one}" for one in sets], {}).spec.runtime


@pytest.fixture
def status() -> Status:
    found = Status("latex", "0.1.0")
    found.start_stage("baseline")
    found.finish_stage("baseline", 2.5, METRICS)
    found.start_stage("train")
    found.set_step(STEP)
    return found


def samples(text: str) -> dict[str, float]:
    """Values by name and labels, after checking that every line is of the format."""
    found = {}
    typed = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split()
            assert kind == "gauge"
            assert name not in typed
            typed.add(name)
        elif not line.startswith("# HELP "):
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            assert sample[1] in typed
            found[sample[1].removeprefix("finetune_job_") + sample[2]] = float(sample[3])
    assert text.endswith("\n")
    return found


def test_the_exposition_has_stage_step_loss_and_speed(status: Status) -> None:
    found = samples(prometheus.exposition(status.snapshot))
    named = '{name="latex"}'
    assert found[f"step{named}"] == 30
    assert found[f"steps{named}"] == 40
    assert found[f"loss{named}"] == 1.25
    assert found[f"tokens_per_second{named}"] == 1234.5
    assert found[f"data_wait_seconds{named}"] == 0.25
    assert found[f"data_wait_share{named}"] == 0.5
    assert found['stage{name="latex",stage="train"}'] == 1
    assert found['stage_seconds{name="latex",stage="baseline"}'] == 2.5
    assert found['eval{name="latex",when="baseline",metric="cer"}'] == 1.5
    assert found['state{name="latex",state="running"}'] == 1
    assert found['state{name="latex",state="failed"}'] == 0


BEST = Validation(
    step=20, epoch=0.5, metrics={"eval_loss": 0.5, "eval_cer": 0.25}, seconds=1.5, best=True
)
LATER = Validation(
    step=30, epoch=0.75, metrics={"eval_loss": 0.75, "eval_cer": math.nan}, seconds=2.0, best=False
)


def test_validations_are_told_as_the_last_and_the_best(status: Status) -> None:
    status.set_validation(BEST)
    status.set_validation(LATER)
    found = samples(prometheus.exposition(status.snapshot))
    assert found['validation{name="latex",when="last",metric="loss"}'] == 0.75
    assert found['validation{name="latex",when="best",metric="cer"}'] == 0.25
    assert found['validation_step{name="latex",when="last"}'] == 30
    assert found['validation_step{name="latex",when="best"}'] == 20
    assert found['validation_seconds{name="latex"}'] == 2.0
    told = kubeflow.trainer_status(status.snapshot)
    jsonschema.validate(told, {**SCHEMAS, "$ref": "#/$defs/TrainerStatus"})
    metrics = {each["name"]: each["value"] for each in told["metrics"]}  # type: ignore[attr-defined]
    assert (metrics["eval_loss"], metrics["best_eval_loss"]) == ("0.75", "0.5")
    assert metrics["best_step"] == "20"
    assert "eval_cer" not in metrics  # NaN, which not every reader parses


def test_each_group_of_weights_has_its_learning_rate(status: Status) -> None:
    status.set_step(replace(STEP, learning_rates={"base": 2e-4, "lora_B": 1e-3}))
    found = samples(prometheus.exposition(status.snapshot))
    assert found['group_learning_rate{name="latex",group="lora_B"}'] == 1e-3


def test_what_is_not_known_yet_has_no_sample() -> None:
    found = samples(prometheus.exposition(Status("latex", "0.1.0").snapshot))
    assert {name.partition("{")[0] for name in found} == {
        "info",
        "state",
        "updated_timestamp_seconds",
    }


def test_labels_are_escaped_and_numbers_may_be_none() -> None:
    step = replace(STEP, loss=math.nan, grad_norm=math.inf)
    now = Snapshot(name='a"b\\c\nd', version="1", step=step)
    found = samples(prometheus.exposition(now))
    [loss] = [value for name, value in found.items() if name.startswith("loss")]
    assert math.isnan(loss)


def test_the_port_answers_while_the_job_runs_and_is_free_after_it(status: Status) -> None:
    [port] = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    reporting = StatusReporter(status, runtime(f"metrics_port={port}"))
    answer = httpx.get(f"{address}/metrics")
    assert answer.headers["Content-Type"] == prometheus.CONTENT_TYPE
    assert samples(answer.text) == samples(prometheus.exposition(status.snapshot))
    assert httpx.get(f"{address}/secrets").status_code == 404
    reporting.close()
    StatusReporter(status, runtime(f"metrics_port={port}")).close()


def test_a_client_that_disconnects_leaves_no_traceback_in_the_log(
    status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    [port] = free_ports(1)
    reporting = StatusReporter(status, runtime(f"metrics_port={port}"))
    for _ in range(5):
        client = socket.create_connection(("127.0.0.1", port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        client.send(b"GET /metrics HTTP/1.1\r\n")
        client.close()
    assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
    reporting.close()
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_told_before_any_work(status: Status) -> None:
    with serving(lambda *_: (200, "")) as address:
        port = address.rpartition(":")[2]
        with pytest.raises(SpecError, match=r"\$\.runtime\.metrics_port: cannot be listened on"):
            StatusReporter(status, runtime(f"metrics_port={port}"))


def test_the_file_holds_the_last_state(status: Status, tmp_path: Path) -> None:
    path = tmp_path / "collector" / "job.prom"
    reporting = StatusReporter(status, runtime(f"metrics_file={path}"))
    status.end("succeeded")
    reporting.close()
    found = samples(path.read_text())
    assert found['state{name="latex",state="succeeded"}'] == 1
    assert [child.name for child in path.parent.iterdir()] == ["job.prom"]


def test_a_watcher_that_fails_is_warned_of_once_and_costs_nothing(
    status: Status, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("text")
    (tmp_path / "file").touch()
    reporting = StatusReporter(status, runtime(f"metrics_file={tmp_path}/file/job.prom"))
    status.end("failed")
    reporting.close()
    assert capsys.readouterr().err.count("the status cannot be reported") == 1


@pytest.mark.parametrize("fault", ["an answer that is no HTTP", "a variable that is missing"])
def test_a_trainer_that_cannot_be_told_is_warned_of_and_told_again(
    fault: str, status: Status, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("text")
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"garbage\r\n")
                asked.set()

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv(kubeflow.URL, f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv(kubeflow.TOKEN, "/dev/null")
        monkeypatch.delenv(kubeflow.CERTIFICATE, raising=False)
        if fault == "a variable that is missing":
            monkeypatch.delenv(kubeflow.TOKEN)
        reporting = StatusReporter(status, runtime())
        if fault == "an answer that is no HTTP":
            assert asked.wait(30)
        status.end("failed")
        reporting.close()
    said = capsys.readouterr().err
    assert said.count("the status cannot be reported") == 1
    assert "Traceback" not in said


# --- Kubeflow Trainer -----------------------------------------------------------------------

SCHEMAS = yaml.safe_load(
    (ROOT / "tests/schemas/trainer.kubeflow.org.v1alpha1.yaml").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(
    ("state", "stage", "step", "finished", "percentage"),
    [
        ("running", "prep", None, {}, 0),
        ("running", "train", STEP, {}, 75),
        ("running", "eval", replace(STEP, step=40), {"train": 9.0}, 99),
        ("running", "eval", None, {"train": 0.0}, 99),
        ("succeeded", None, replace(STEP, step=40), {"train": 9.0}, 100),
        ("failed", None, STEP, {}, 75),
    ],
)
def test_the_trainer_is_told_what_its_schema_takes(
    state: str, stage: str | None, step: Step | None, finished: dict[str, float], percentage: int
) -> None:
    now = Snapshot(
        name="latex",
        version="1",
        state=state,
        stage=stage,
        step=step,
        finished=finished,
        metrics={"final": {"cer": 0.5, "loss": math.nan}},
        updated=time.time(),
    )
    told = kubeflow.trainer_status(now)
    jsonschema.validate(told, {**SCHEMAS, "$ref": "#/$defs/TrainerStatus"})
    assert told["progressPercentage"] == percentage
    assert ("estimatedRemainingSeconds" in told) is (stage == "train")
    metrics = told["metrics"]
    assert isinstance(metrics, list)
    by_name = {metric["name"]: metric["value"] for metric in metrics}
    assert by_name["stage"] == (stage or state)
    assert by_name["final_cer"] == "0.5"
    assert "final_loss" not in by_name


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    directory = tmp_path_factory.mktemp("tls")
    key, chain = directory / "tls.key", directory / "ca.crt"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    made += ["-keyout", str(key), "-out", str(chain), "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(made, check=True, capture_output=True)
    return key, chain


def test_the_trainer_hears_the_end_over_tls_with_the_pods_token(
    status: Status,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, chain = certificate
    (tmp_path / "token").write_text("pods-token\n")
    heard: list[tuple[str, str, dict[str, object]]] = []

    def take(path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        heard.append((path, headers["Authorization"], json.loads(body)["trainerStatus"]))
        return 200, "{}"

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with serving(take, context) as address:
        monkeypatch.setenv(kubeflow.URL, f"{address}/status")
        monkeypatch.setenv(kubeflow.CERTIFICATE, str(chain))
        monkeypatch.setenv(kubeflow.TOKEN, str(tmp_path / "token"))
        reporting = StatusReporter(status, runtime())
        status.end("succeeded")
        reporting.close()
    path, authorization, told = heard[-1]
    assert (path, authorization) == ("/status", "Bearer pods-token")
    assert told["progressPercentage"] == 100


def test_a_trainer_without_the_certificate_is_not_trusted(
    status: Status,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, chain = certificate
    (tmp_path / "token").write_text("pods-token")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    heard: list[str] = []

    def take(path: str, *_: object) -> tuple[int, str]:
        heard.append(path)
        return 200, "{}"

    log.configure("text")
    with serving(take, context) as address:
        monkeypatch.setenv(kubeflow.URL, address)
        monkeypatch.setenv(kubeflow.TOKEN, str(tmp_path / "token"))
        StatusReporter(status, runtime()).close()
    assert heard == []
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err


# --- lines for machines ---------------------------------------------------------------------


def test_a_line_for_machines_has_its_stage_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json")
    with log.stage("train"):
        log.info(
            "train",
            step=log.fraction(3, 40),
            loss=math.nan,
            memory=log.byte_count(2**30),
            left=log.seconds(200.0),
        )
    log.info("done")
    first, last = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    for key in ("time", "level", "event"):
        del first[key]
    assert first == {
        "stage": "train",
        "step": 3,
        "step_total": 40,
        "loss": None,
        "memory_bytes": 2**30,
        "left_seconds": 200.0,
    }
    assert "stage" not in last


def test_the_same_line_for_people_has_units(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("text")
    log.info(
        "train", step=log.fraction(3, 40), memory=log.byte_count(2**30), left=log.seconds(200.0)
    )
    assert 'train step=3/40 memory="1.0 GiB" left=3m20s' in capsys.readouterr().err

"""Alerts and dashboard ask for metrics that a job serves, of the pods that serve them."""

import json
import re
from typing import Any

import yaml

from job.kubernetes import constants, layout, monitoring
from job.kubernetes.cluster import Cluster
from job.telemetry.prometheus import exposition
from job.telemetry.status import Snapshot, Step, Validation
from tests.jobs import ROOT

K8S = ROOT / "k8s"
METRIC = re.compile(r"finetune_job_[a-z_]+")
STEP = Step(
    step=10,
    steps=100,
    epoch=0.1,
    loss=1.5,
    learning_rate=1e-4,
    grad_norm=1.0,
    tokens_per_second=100.0,
    tflops=300.0,
    mfu=0.3,
    data_wait_seconds=0.1,
    data_wait_share=0.1,
    memory_bytes=1,
    seconds=1.0,
    left_seconds=90.0,
)
VALIDATION = Validation(step=10, epoch=0.1, metrics={"eval_loss": 1.0}, seconds=2.0, best=True)
SERVED = exposition(
    Snapshot(
        name="latex",
        version="1",
        stage="train",
        finished={"prep": 1.0},
        step=STEP,
        metrics={"baseline": {"cer": 0.5}},
        validation=VALIDATION,
        best=VALIDATION,
    )
)
"""What a job serves in the middle of its training."""


def labels_of(metric: str) -> set[str]:
    return set(re.findall(r'(\w+)="', "".join(re.findall(rf"^{metric}(\{{.*?\}})", SERVED, re.M))))


def expressions() -> dict[str, str]:
    """Every expression of alerts and dashboard, with its legend or summary."""
    [group] = monitoring.alerts()["spec"]["groups"]
    found = {rule["expr"]: rule["annotations"]["summary"] for rule in group["rules"]}
    [text] = monitoring.dashboard()["data"].values()
    for panel in json.loads(text)["panels"]:
        for target in panel["targets"]:
            found[target["expr"]] = target["legendFormat"]
    return found


def test_every_metric_of_alerts_and_dashboard_is_one_that_a_job_serves() -> None:
    served = set(re.findall(r"^# TYPE (\S+)", SERVED, re.MULTILINE))
    [text] = monitoring.dashboard()["data"].values()
    asked = set(METRIC.findall(text)) | set(METRIC.findall(" ".join(expressions())))
    assert asked <= served
    # What a user of the pages below looks for is there.
    for name in (
        "loss",
        "tokens_per_second",
        "left_seconds",
        "eval",
        "validation",
        "stage_seconds",
    ):
        assert f"finetune_job_{name}" in asked


def test_every_label_in_a_legend_is_one_that_the_metric_has() -> None:
    for expression, legend in expressions().items():
        metric = METRIC.findall(expression)[0]
        named = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", legend))
        assert named <= labels_of(metric), (expression, legend)
        stages = re.findall(r'stage="(\w+)"', expression)
        assert set(stages) <= {"prep", "train", "eval", "export"}


def test_prometheus_reads_the_port_that_the_job_s_pods_name() -> None:
    spec = monitoring.pod_monitor()["spec"]
    [job] = [
        document
        for document in yaml.safe_load_all((K8S / layout.JOB).read_text())
        if document["kind"] == "Job"
    ]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]] == ["metrics"]


def test_prometheus_asks_only_the_pod_of_several_nodes_that_serves_metrics() -> None:
    [endpoint] = monitoring.pod_monitor()["spec"]["podMetricsEndpoints"]
    [rule] = endpoint["relabelings"]
    assert rule["action"] == "drop"
    assert rule["sourceLabels"] == [
        "__meta_kubernetes_pod_label_batch_kubernetes_io_job_completion_index"
    ]
    # A pod of a Job on one node has no such label, which Prometheus takes for an empty one.
    indices = ("", "0", "1", "10", "12")
    assert [i for i in indices if not re.fullmatch(rule["regex"], i)] == ["", "0"]


def test_monitoring_stands_in_the_namespace_that_is_asked_for() -> None:
    asked = Cluster(namespace="team", labels={"release": "prometheus"})
    for [document] in monitoring.files(asked).values():
        metadata: Any = document["metadata"]
        assert metadata["namespace"] == "team"
        assert metadata["labels"]["release"] == "prometheus"
        assert metadata["labels"]["app.kubernetes.io/part-of"] == constants.NAME

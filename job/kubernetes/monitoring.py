"""Monitoring of every job in a namespace: a PodMonitor, alerts, and a Grafana dashboard.

They need the Prometheus operator, and jobs with `runtime.metrics_port`.
"""

import json
import re
from collections.abc import Mapping

from job import __version__
from job.kubernetes import constants
from job.kubernetes.adaptation import fit_metadata
from job.kubernetes.cluster import Cluster
from job.kubernetes.context import Object

API = "monitoring.coreos.com/v1"
PORT = "metrics"
"""The name of the port in the job's pods."""
INDEX = "batch.kubernetes.io/job-completion-index"
"""The label of a pod of several nodes with its place among them, from which its rank is taken."""
QUIET_MINUTES = 30
"""How long a training may log nothing."""
POD = "namespace, pod, name"
DASHBOARD_LABEL = "grafana_dashboard"
"""The label by which Grafana's sidecar finds dashboards."""
WIDTH, HEIGHT = 8, 7
"""Of a panel; a dashboard is 24 wide."""


def files(cluster: Cluster) -> Mapping[str, list[Object]]:
    """The documents by file name."""
    return {
        "pod-monitor.yaml": [_fitted(pod_monitor(), cluster)],
        "alerts.yaml": [_fitted(alerts(), cluster)],
        "dashboard.yaml": [_fitted(dashboard(), cluster)],
    }


def pod_monitor() -> Object:
    """Reads the metrics of every job; with several nodes, of the pod of rank 0, which serves them.

    The others would count as targets that are down.
    """
    index = re.sub(r"\W", "_", INDEX)
    other = {
        "sourceLabels": [f"__meta_kubernetes_pod_label_{index}"],
        "regex": "[1-9][0-9]*",
        "action": "drop",
    }
    return {
        "apiVersion": API,
        "kind": "PodMonitor",
        "metadata": _metadata(constants.NAME),
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": constants.NAME}},
            "podMetricsEndpoints": [{"port": PORT, "interval": "30s", "relabelings": [other]}],
        },
    }


def alerts() -> Object:
    """Rules for what a job cannot tell by its exit code: it still runs, but badly.

    A failed job is no longer there to be scraped; kube-state-metrics reports those.
    """
    training = f'on({POD}) finetune_job_stage{{stage="train"}} == 1'
    quiet = f"time() - finetune_job_updated_timestamp_seconds > {QUIET_MINUTES * 60}"
    usual = "avg_over_time(finetune_job_tokens_per_second[2h])"
    rules = [
        _alert(
            "FinetuneJobStalled",
            f"({quiet}) and {training}",
            "5m",
            f"{{{{ $labels.name }}}} has logged neither step nor validation for {QUIET_MINUTES} "
            "minutes.",
            "critical",
        ),
        _alert(
            "FinetuneJobLossNotFinite",
            "finetune_job_loss != finetune_job_loss or abs(finetune_job_loss) == +Inf",
            "0m",
            "{{ $labels.name }} trains with a loss that is not finite.",
            "critical",
        ),
        _alert(
            "FinetuneJobWaitsForData",
            f"finetune_job_data_wait_share > 0.3 and {training}",
            "15m",
            "{{ $labels.name }} spends {{ $value | humanizePercentage }} of its time waiting for "
            "data; raise train.dataloader_num_workers.",
        ),
        _alert(
            "FinetuneJobSlow",
            f"(finetune_job_tokens_per_second < 0.5 * {usual}) and {training}",
            "15m",
            "{{ $labels.name }} trains at less than half its usual speed.",
        ),
    ]
    return {
        "apiVersion": API,
        "kind": "PrometheusRule",
        "metadata": _metadata(constants.NAME),
        "spec": {"groups": [{"name": constants.NAME, "rules": rules}]},
    }


def _alert(
    name: str, expression: str, held: str, summary: str, severity: str = "warning"
) -> Object:
    return {
        "alert": name,
        "expr": expression,
        "for": held,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }


def dashboard() -> Object:
    """The dashboard, in a ConfigMap that Grafana's sidecar imports."""
    metadata = _metadata(f"{constants.NAME}-dashboard")
    metadata["labels"][DASHBOARD_LABEL] = "1"
    text = json.dumps(_dashboard(), indent=1)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {f"{constants.NAME}.json": f"{text}\n"},
    }


_PANELS: tuple[tuple[str, str, str, str], ...] = (
    ("Stage", "{stage} == 1", "{{name}}: {{stage}}", "none"),
    ("Progress", "{step} / {steps}", "{{name}}", "percentunit"),
    ("Time left", "{left_seconds}", "{{name}}", "s"),
    ("Loss", "{loss}", "{{name}}", "none"),
    ("Learning rate", "{learning_rate}", "{{name}}", "none"),
    ("Gradient norm", "{grad_norm}", "{{name}}", "none"),
    ("Tokens per second", "{tokens_per_second}", "{{name}}", "none"),
    ("Model FLOPs utilization", "{mfu}", "{{name}}", "percentunit"),
    ("Share of time waiting for data", "{data_wait_share}", "{{name}}", "percentunit"),
    ("Peak memory", "{memory_bytes}", "{{name}}", "bytes"),
    ("Finished stages", "{stage_seconds}", "{{name}}: {{stage}}", "s"),
    ("Validation", "{validation}", "{{name}}: {{when}} {{metric}}", "none"),
    ("Evaluation", "{eval}", "{{name}}: {{when}} {{metric}}", "none"),
    ("Time since the last report", "time() - {updated_timestamp_seconds}", "{{name}}", "s"),
)
"""Title, expression with the metrics in braces, legend, unit."""


def _dashboard() -> Object:
    source = {"type": "prometheus", "uid": "${source}"}
    panels = []
    for index, (title, expression, legend, unit) in enumerate(_PANELS):
        text = re.sub(r"\{(\w+)\}", r'finetune_job_\1{name=~"$job"}', expression)
        row, column = divmod(index, 24 // WIDTH)
        panels.append(
            {
                "id": index + 1,
                "type": "timeseries",
                "title": title,
                "datasource": source,
                "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
                "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                "targets": [{"refId": "A", "expr": text, "legendFormat": legend}],
            }
        )
    jobs = {
        "name": "job",
        "type": "query",
        "datasource": source,
        "query": "label_values(finetune_job_info, name)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
    }
    return {
        "uid": constants.NAME,
        "title": "Fine-tuning jobs",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "type": "datasource", "query": "prometheus"}, jobs]
        },
        "panels": panels,
    }


def _metadata(name: str) -> Object:
    return {
        "name": name,
        "labels": {
            "app.kubernetes.io/name": constants.NAME,
            "app.kubernetes.io/component": "monitoring",
            "app.kubernetes.io/version": __version__,
            "app.kubernetes.io/part-of": constants.NAME,
            "app.kubernetes.io/managed-by": constants.NAME,
        },
    }


def _fitted(document: Object, cluster: Cluster) -> Object:
    fit_metadata(document["metadata"], cluster, namespaced=True)
    return document

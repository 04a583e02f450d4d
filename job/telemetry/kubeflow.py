"""Reports the status of a TrainJob to Kubeflow Trainer (2.2 and later).

With its feature gate TrainJobStatus on, the Trainer gives the pod an address, a certificate and a
token: https://github.com/kubeflow/trainer, docs/proposals/2779-trainjob-progress.
"""

import json
import math
import os
import ssl
import time
import urllib.request
from pathlib import Path

from job.telemetry.status import Snapshot

URL = "KUBEFLOW_TRAINER_SERVER_URL"
CERTIFICATE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105 - the variable that names the token's file
TIMEOUT = 3.0
DONE, ALMOST = 100, 99


class KubeflowSink:
    """Posts the status to the Trainer, which asks for five seconds between posts."""

    interval_seconds = 5.0

    @classmethod
    def from_environment(cls) -> "KubeflowSink | None":
        """The sink for the Trainer's address in the environment; None if there is none."""
        return cls(os.environ[URL]) if os.environ.get(URL) else None

    def __init__(self, url: str) -> None:
        self._url = url

    def write(self, snapshot: Snapshot) -> None:
        """Raises OSError if the Trainer does not accept it."""
        # The kubelet rotates the token, so it is read each time.
        token = Path(os.environ[TOKEN]).read_text(encoding="utf-8").strip()
        request = urllib.request.Request(  # noqa: S310 - the Trainer's address
            self._url,
            data=json.dumps({"trainerStatus": trainer_status(snapshot)}).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        certificate = os.environ.get(CERTIFICATE)
        context = ssl.create_default_context(cafile=certificate) if certificate else None
        with urllib.request.urlopen(request, timeout=TIMEOUT, context=context):  # noqa: S310
            return


def trainer_status(snapshot: Snapshot) -> dict[str, object]:
    """`status.trainerStatus` of the TrainJob; 100 percent only when the whole job is done."""
    status: dict[str, object] = {
        "lastUpdatedTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(snapshot.updated)),
        "progressPercentage": _percentage(snapshot),
    }
    # Values are text; NaN and infinity are omitted, since not every reader parses them.
    metrics: dict[str, object] = {"stage": snapshot.stage or snapshot.state}
    if snapshot.step is not None:
        if snapshot.stage == "train":
            status["estimatedRemainingSeconds"] = max(0, round(snapshot.step.left_seconds))
        for name in ("step", "steps", "epoch", "loss", "learning_rate", "tokens_per_second"):
            metrics[name] = getattr(snapshot.step, name)
        if snapshot.step.mfu is not None:
            metrics["mfu"] = snapshot.step.mfu
    if snapshot.validation is not None:
        metrics.update(snapshot.validation.metrics)
    if snapshot.best is not None:
        metrics["best_step"] = snapshot.best.step
        metrics.update({f"best_{name}": value for name, value in snapshot.best.metrics.items()})
    for when, values in snapshot.metrics.items():
        metrics.update({f"{when}_{metric}": value for metric, value in values.items()})
    status["metrics"] = [
        {"name": name, "value": str(value)}
        for name, value in metrics.items()
        if not isinstance(value, float) or math.isfinite(value)
    ]
    return status


def _percentage(snapshot: Snapshot) -> int:
    if snapshot.state == "succeeded":
        return DONE
    if snapshot.step is not None:
        return min(ALMOST, snapshot.step.step * 100 // max(1, snapshot.step.steps))
    return ALMOST if "train" in snapshot.finished else 0

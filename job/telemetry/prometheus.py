"""The status in Prometheus' text format: in a file for the textfile collector, and over HTTP."""

import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from job import log, storage
from job.errors import SpecError
from job.telemetry.status import Snapshot, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "finetune_job"
STATES = ("running", "succeeded", "failed", "preempted")
STEP = {
    "step": "Last logged training step.",
    "steps": "Number of training steps.",
    "epoch": "Epochs completed.",
    "loss": "Mean training loss since the previous log.",
    "learning_rate": "Learning rate.",
    "grad_norm": "Gradient norm before clipping.",
    "tokens_per_second": "Tokens trained per second since the previous log.",
    "tflops": "TFLOP/s of each device, by the model's operations.",
    "mfu": "Model FLOPs utilization: TFLOP/s as a share of the device's bf16 peak.",
    "data_wait_seconds": "Seconds per step spent waiting for data since the previous log.",
    "data_wait_share": "Share of the time since the previous log spent waiting for data.",
    "memory_bytes": "Peak memory of the device, or of the process on a CPU.",
    "left_seconds": "Estimated seconds until training ends.",
}

Sample = tuple[dict[str, str], float]


def exposition(snapshot: Snapshot) -> str:
    """The snapshot as gauges with their help; unknown values have no sample."""
    lines: list[str] = []
    for name, about, samples in _families(snapshot):
        if samples:
            full = f"{PREFIX}_{name}"
            lines += [f"# HELP {full} {about}", f"# TYPE {full} gauge"]
            lines += [
                f"{full}{_labels({'name': snapshot.name, **own})} {n!r}" for own, n in samples
            ]
    return "\n".join(lines) + "\n"


def _families(snapshot: Snapshot) -> Iterator[tuple[str, str, list[Sample]]]:
    yield "info", "Name and version of the job.", [({"version": snapshot.version}, 1.0)]
    states = [({"state": state}, float(state == snapshot.state)) for state in STATES]
    yield "state", "1 for the current state of the job.", states
    if snapshot.stage is not None:
        yield "stage", "The running stage.", [({"stage": snapshot.stage}, 1.0)]
    seconds = [({"stage": name}, float(took)) for name, took in snapshot.finished.items()]
    yield "stage_seconds", "Duration of each finished stage in seconds.", seconds
    if snapshot.step is not None:
        for name, about in STEP.items():
            value = getattr(snapshot.step, name)
            yield name, about, [] if value is None else [({}, float(value))]
        rates = (snapshot.step.learning_rates or {}).items()
        about = "Learning rate of each group of weights, if not all have the same."
        yield "group_learning_rate", about, [({"group": name}, rate) for name, rate in rates]
    validations = {"last": snapshot.validation, "best": snapshot.best}
    known = {when: each for when, each in validations.items() if each is not None}
    validated = [
        ({"when": when, "metric": key.removeprefix("eval_")}, float(value))
        for when, each in known.items()
        for key, value in each.metrics.items()
    ]
    yield "validation", "Metrics of the last validation and of the best so far.", validated
    steps = [({"when": when}, float(each.step)) for when, each in known.items()]
    yield "validation_step", "Training step of the last and of the best validation.", steps
    if snapshot.validation is not None:
        took: list[Sample] = [({}, float(snapshot.validation.seconds))]
        yield "validation_seconds", "Duration of the last validation in seconds.", took
    metrics = [
        ({"when": when, "metric": metric}, float(value))
        for when, values in snapshot.metrics.items()
        for metric, value in values.items()
    ]
    yield "eval", "Metrics before training (baseline) and after it (final).", metrics
    yield "updated_timestamp_seconds", "Time of the last change.", [({}, snapshot.updated)]


def _labels(labels: dict[str, str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class MetricsFile:
    """Writes the status to a file, atomically."""

    interval_seconds = 1.0

    def __init__(self, path: str) -> None:
        self._path = path

    def write(self, snapshot: Snapshot) -> None:
        storage.write_text(self._path, exposition(snapshot))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Keeps a client's disconnect out of the job's log: by default its traceback is printed."""
        log.debug("metrics request failed", reason=sys.exception())


class MetricsServer:
    """Serves `GET /metrics` on every address of the machine."""

    def __init__(self, port: int, status: Status) -> None:
        """Raises SpecError if it cannot listen on the port."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exists = self.path.partition("?")[0] == "/metrics"
                body = (
                    exposition(status.snapshot).encode() if exists else b"metrics are at /metrics\n"
                )
                self.send_response(200 if exists else 404)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        try:
            self._server = _Server(("", port), Handler)
        except OSError as error:
            raise SpecError(
                "$.runtime.metrics_port",
                f"cannot be listened on: {error.strerror}",
                value=port,
                fix="choose a free port above 1023, or null for none",
            ) from error
        # A short poll interval, so that closing does not delay the end of the job.
        serve = partial(self._server.serve_forever, poll_interval=0.05)
        threading.Thread(target=serve, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

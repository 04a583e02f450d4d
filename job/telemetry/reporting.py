"""Reports the status of one run to its sinks, in background threads."""

import threading
import time
from typing import Protocol

from job import log
from job.spec.types import RuntimeSpec
from job.telemetry.kubeflow import KubeflowSink
from job.telemetry.prometheus import MetricsFile, MetricsServer
from job.telemetry.status import Snapshot, Status

CLOSE_SECONDS = 2.0
"""How long the end of the job waits for the last reports."""


class Sink(Protocol):
    interval_seconds: float
    """The minimum time between two writes."""

    def write(self, snapshot: Snapshot) -> None:
        """Raises any error if it cannot."""


class StatusReporter:
    """Writes the status to all configured sinks until closed, each in its own thread."""

    def __init__(self, status: Status, runtime: RuntimeSpec) -> None:
        """Raises SpecError if the metrics port is unavailable."""
        self._status = status
        self._server = MetricsServer(runtime.metrics_port, status) if runtime.metrics_port else None
        self._closing = threading.Event()
        sinks: list[Sink] = []
        if runtime.metrics_file is not None:
            sinks.append(MetricsFile(runtime.metrics_file))
        if (trainer := KubeflowSink.from_environment()) is not None:
            sinks.append(trainer)
        self._threads = [
            threading.Thread(target=self._report, args=(sink,), name="telemetry", daemon=True)
            for sink in sinks
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Reports how the job ended."""
        self._closing.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._server is not None:
            self._server.close()

    def _report(self, sink: Sink) -> None:
        written: Snapshot | None = None
        warned = False
        while True:
            # Read before the snapshot, so that the last one written includes the end.
            last = self._closing.is_set()
            snapshot = self._status.snapshot
            if snapshot is not written:
                try:
                    sink.write(snapshot)
                except Exception as error:  # noqa: BLE001 - a sink never affects the job
                    if not warned:
                        name = type(sink).__name__
                        log.warn("the status cannot be reported", watcher=name, reason=error)
                    warned = True
                written = snapshot
            if last:
                return
            self._closing.wait(sink.interval_seconds)

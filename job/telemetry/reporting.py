"""The watchers of one run: started with it, told in the background, told the end at its end."""

import threading
import time
from typing import Protocol

from job import log
from job.spec.types import RuntimeSpec
from job.telemetry.kubeflow import TrainerStatus
from job.telemetry.prometheus import Port, TextFile
from job.telemetry.status import Snapshot, Status

LAST_SECONDS = 2.0
"""How long the end of the job waits for its watchers to hear of it."""


class Watcher(Protocol):
    every: float
    """Seconds between two writes, at the least."""

    def write(self, now: Snapshot) -> None:
        """Raises an error of whatever kind where it cannot."""


class Reporting:
    """Hands the status on until it is closed; starts no thread where nobody watches."""

    def __init__(self, status: Status, runtime: RuntimeSpec) -> None:
        """Raises SpecError where the port for metrics cannot be had."""
        self._status = status
        self._port = Port(runtime.metrics_port, status) if runtime.metrics_port else None
        self._closing = threading.Event()
        watchers: list[Watcher] = []
        if runtime.metrics_file is not None:
            watchers.append(TextFile(runtime.metrics_file))
        if (trainer := TrainerStatus.of_environment()) is not None:
            watchers.append(trainer)
        self._threads = [
            threading.Thread(target=self._watch, args=(watcher,), name="telemetry", daemon=True)
            for watcher in watchers
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Tells the watchers how the job ended."""
        self._closing.set()
        deadline = time.monotonic() + LAST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._port is not None:
            self._port.close()

    def _watch(self, watcher: Watcher) -> None:
        written: Snapshot | None = None
        warned = False
        while True:
            # Looked at before the snapshot, so that the last one is of the end.
            last = self._closing.is_set()
            now = self._status.now
            if now is not written:
                try:
                    watcher.write(now)
                except Exception as error:  # noqa: BLE001 - a watcher costs the job nothing
                    if not warned:
                        name = type(watcher).__name__
                        log.warn("the job's status cannot be told", watcher=name, reason=error)
                    warned = True
                written = now
            if last:
                return
            self._closing.wait(watcher.every)

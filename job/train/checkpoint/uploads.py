"""Stores checkpoints while training goes on: one is under way, one more may wait.

A third has to wait for a place, so that a store slower than the training slows it down rather
than fills the disk. What fails in the background is raised at the next step, or at the end.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from job import log


@dataclass(frozen=True, kw_only=True)
class _Upload:
    step: int
    store: Callable[[], None]


class BackgroundUploads:
    """A thread that stores one checkpoint after the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: _Upload | None = None
        self._running: _Upload | None = None
        self._error: BaseException | None = None
        self.stored_step: int | None = None
        """The newest step that is stored whole."""

    def __enter__(self) -> "BackgroundUploads":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until everything submitted is stored; an error on its way out goes first."""
        try:
            self.finish()
        except BaseException:
            if error[0] is None:
                raise

    def submit(self, step: int, store: Callable[[], None], *, urgent: bool = False) -> None:
        """Has `store` called in the background; waits while another is waiting already.

        An urgent one takes the place of the one that waits: when the job has to stop, only the
        newest checkpoint counts. Raises what an earlier one failed with.
        """
        with self._changed:
            while self._waiting is not None and self._error is None and not urgent:
                self._changed.wait()
            self._raise()
            if self._waiting is not None:
                log.info("checkpoint left out for a newer one", step=self._waiting.step)
            self._waiting = _Upload(step=step, store=store)
            if self._running is None:
                self._take()

    def check(self) -> None:
        """Raises what a background upload failed with."""
        with self._changed:
            self._raise()

    def finish(self) -> None:
        """Waits until everything submitted is stored; raises what failed."""
        with self._changed:
            while self._running is not None:
                self._changed.wait()
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _take(self) -> None:
        self._running, self._waiting = self._waiting, None
        if self._running is not None:
            # A thread for each, as a daemon: a second signal must not wait for it.
            threading.Thread(
                target=self._store, args=(self._running,), name="checkpoint", daemon=True
            ).start()
        self._changed.notify_all()

    def _store(self, upload: _Upload) -> None:
        error: BaseException | None = None
        try:
            upload.store()
        except BaseException as failed:  # noqa: BLE001 - raised again where training sees it
            error = failed
        with self._changed:
            if error is None:
                self.stored_step = upload.step
            else:
                self._error, self._waiting = error, None
            self._take()

"""Uploads checkpoints in the background while training continues.

One upload runs and one more may wait. A third blocks the training, so that a slow store throttles
it instead of filling the disk. Errors are raised at the next training step, or when training ends.
"""

from collections.abc import Callable

from job import log
from job.storage.background import BackgroundTasks

RUNNING, WAITING = 1, 1


class BackgroundUploads:
    """Uploads checkpoints one after the other."""

    def __init__(self) -> None:
        self._tasks = BackgroundTasks("checkpoint", threads=RUNNING, max_pending=RUNNING + WAITING)
        self.submitted_step: int | None = None
        """The newest step whose upload was requested; it may be waiting."""
        self.stored_step: int | None = None
        """The newest step whose checkpoint is complete in the store."""

    def __enter__(self) -> "BackgroundUploads":
        return self

    def __exit__(self, *error: object) -> None:
        """Finishes all uploads, even after an exception, which takes precedence over theirs."""
        try:
            self.finish()
        except BaseException:
            if error[0] is None:
                raise

    def submit(self, step: int, store: Callable[[], None], *, urgent: bool = False) -> None:
        """Calls `store` in the background; blocks while another upload is waiting.

        An urgent upload replaces the waiting one: when the job must stop, only the newest
        checkpoint counts. Raises the error of an earlier upload.
        """
        if urgent and self._tasks.cancel_waiting():
            log.info("checkpoint skipped for a newer one", step=self.submitted_step)

        def upload() -> None:
            store()
            self.stored_step = step

        self._tasks.submit(upload)
        self.submitted_step = step

    def check(self) -> None:
        """Raises the error of a failed upload."""
        self._tasks.check()

    def finish(self) -> None:
        """Waits for all uploads; raises the error of a failed one."""
        self._tasks.finish()

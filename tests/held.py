"""The job's command, held at a step until it is asked to stop: however fast it is, it is there.

`python -m tests.held 3/20 run …` waits where a step's log line, or its bar, shows `3/20`.
"""

import sys
import time

from job import log, signals
from job.cli import app

CODE = "from tests import held; held.main()"
"""For `python -c`."""
SECONDS = 240.0
"""After which it goes on all the same."""


def main() -> None:
    _hold(sys.argv.pop(1))
    app.main()


def _hold(count: str) -> None:
    info, advance = log.info, log._Bar.advance

    def said(event: str, **fields: object) -> None:
        info(event, **fields)
        if str(fields.get("step")) == count:
            _wait()

    def shown(bar: log._Bar, done: int = 1, **fields: object) -> None:
        advance(bar, done, **fields)
        [task] = bar._bars.tasks  # type: ignore[attr-defined]
        if count == f"{bar._done}/{task.total}":
            _wait()

    log.info = said
    log._Bar.advance = shown  # type: ignore[assignment]


def _wait() -> None:
    end = time.monotonic() + SECONDS
    while signals.received() is None and time.monotonic() < end:
        time.sleep(0.01)


if __name__ == "__main__":
    main()

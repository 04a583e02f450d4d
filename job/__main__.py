"""`python -m job`, the entrypoint of the container."""

import os
import signal

from job.errors import STOPPED


def _stopped(number: int, _: object) -> None:
    os.write(2, f"{signal.Signals(number).name}: stopped before anything was begun\n".encode())
    os._exit(STOPPED)


if __name__ == "__main__":
    # The first process of a container gets no signal that it has no handler for, and what is
    # imported next takes a moment.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, _stopped)

    from job.cli import main

    main()

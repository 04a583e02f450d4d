"""Trials that a process does not survive, for `test_ways.py`."""

import os
import signal
import time
from collections.abc import Sequence

import torch

from job.families.outcome import Outcome, left


def run(names: Sequence[str], device: torch.device) -> list[Outcome]:
    if "crashes" in names:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hangs" in names:
        time.sleep(600)
    print('{"event": "a library\'s own line"}\n{not JSON', flush=True)
    if "raises" in names:
        return [left("raises", "no such kernel")]
    return [Outcome(way=names[0], taken=True, reason="0.10 ms", milliseconds=0.1, off=0.0)]

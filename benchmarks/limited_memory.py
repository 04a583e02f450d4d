"""Runs the job as on a GPU with less memory: its allocator gets no more than that.

    python -m benchmarks.limited_memory 24 run specs/… --set model.load_in_4bit=true

The limit holds for what PyTorch allocates; the GPU's context, about half a GiB, comes on top.
"""

import os
import sys

from job.engines.device import ALLOCATOR

GIB = 2**30


def limit(gib: float) -> None:
    """Limits what this process may allocate on each GPU."""
    if not any(name in os.environ for name in ALLOCATOR):  # read when CUDA is initialized, here
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    import torch

    for index in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), index)


def main() -> None:
    """Limits the memory to the first argument, in GiB; the others are the job's."""
    limit(float(sys.argv.pop(1)))
    from job.__main__ import main as job

    job()


if __name__ == "__main__":
    main()

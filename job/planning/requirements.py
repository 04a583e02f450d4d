"""What a job needs of its machine, computed from its sizes.

`plan` reports it, a manifest requests it of a cluster, and `doctor` checks for it.
"""

import math
from dataclasses import dataclass

from job import families
from job.engines.device import Accelerator
from job.planning.memory import PROCESS, estimate, longest
from job.planning.sizes import GIB, Sizes
from job.spec.types import FORMULAS, JobSpec
from job.storage.retry import TOTAL_SECONDS

WORKER = 2 * GIB
"""Per data loading process."""
ON_HOST = 1.2
"""Host memory for merging, as a multiple of the merged weights."""
ON_CPU = 3 * 4
"""Bytes per parameter on a CPU: base, trained and merged model in fp32."""
DATA, DRAWN = 20 * GIB, 2 * GIB
"""Disk for lists and prepared rows, unknown until they are read; the smaller amount if the project
draws all rows itself."""
TMP = 2 * GIB
LOGS = 1 * GIB
UPLOAD_RATE = 50e6
"""Bytes per second that storage must transfer, either way."""
LAST_STEP = 120
"""Seconds for the step in progress when the signal comes."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes, and seconds; per pod in a cluster."""

    memory: int
    """Includes shared memory, which counts towards the pod's limit."""
    shared_memory: int
    cache: int
    """The volume that outlives the pod: downloads, compiled kernels, results without a bucket."""
    work: int
    """Scratch space on the node, for files that are not published yet."""
    tmp: int
    weights: int
    """A server's copy of the merged weights."""
    server_memory: int
    save_seconds: int
    """The longest time that storing a checkpoint may take."""
    grace_seconds: int

    @property
    def ephemeral(self) -> int:
        return self.work + self.tmp + LOGS


def needs(spec: JobSpec, sizes: Sizes, *, gpus: int) -> Needs:
    """What the job needs on a machine with `gpus` devices, or none."""
    workers = spec.train.dataloader_num_workers
    shared = (8 * GIB if gpus else GIB) + workers * GIB
    model = sizes.merged * ON_HOST if gpus else sizes.parameters * ON_CPU
    process = PROCESS + model if gpus else max(PROCESS + model, training_on_cpu(spec))
    drawn = all(source.uri == FORMULAS for source in spec.data.sources().values())
    data = DRAWN if drawn else DATA
    checkpoints = (spec.train.save_total_limit + 1) * sizes.checkpoint
    save = TOTAL_SECONDS + sizes.checkpoint / UPLOAD_RATE
    return Needs(
        memory=_gib(process + workers * WORKER + shared),
        shared_memory=shared,
        cache=_gib(sizes.download * 1.1 + sizes.merged + data),
        work=_gib(sizes.merged + sizes.adapter + checkpoints + data),
        tmp=TMP,
        weights=_gib(sizes.merged * 1.1),
        server_memory=_gib(PROCESS + sizes.merged * ON_HOST + 8 * GIB),
        save_seconds=math.ceil(save),
        grace_seconds=math.ceil((LAST_STEP + save) / 60) * 60,
    )


def training_on_cpu(spec: JobSpec) -> int:
    """Peak memory of training on a CPU, its process included; 0 if it cannot be estimated.

    Assumes rows as long as `train.max_length` allows: a manifest requests memory before any row is
    read, and no row that comes may get the pod killed.
    """
    family, model = families.architecture(spec.model)
    rows = (longest(model, spec),) * spec.train.per_device_train_batch_size
    cpu = Accelerator(kind="cpu", name="CPU", memory_bytes=0)  # the estimate does not depend on it
    memory = estimate(family, model, spec, rows, cpu)
    return memory.total if memory else 0


def _gib(count: float) -> int:
    return max(1, math.ceil(count / GIB)) * GIB

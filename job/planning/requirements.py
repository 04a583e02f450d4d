"""What a job needs of the machine that it runs on, worked out from its sizes.

`plan` tells it, a manifest asks a cluster for it, and `doctor` looks whether it is there.
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
"""Each data loading process."""
ON_HOST = 1.2
"""Host memory that a merge takes, as a multiple of the merged weights."""
ON_CPU = 3 * 4
"""Bytes a parameter where the CPU does the work: base, trained and merged model in fp32."""
DATA, DRAWN = 20 * GIB, 2 * GIB
"""Disk for lists and prepared rows, which nobody can know before they are read; the smaller where
all rows are drawn by the project itself."""
TMP = 2 * GIB
LOGS = 1 * GIB
UPLOAD_RATE = 50e6
"""Bytes a second that storage takes, and gives, at the least."""
LAST_STEP = 120
"""Seconds for the step under way when the signal comes."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes, and seconds; in a cluster of one pod."""

    memory: int
    """With shared memory, which is counted as the pod's."""
    shared_memory: int
    cache: int
    """The volume that survives the pod: downloads, compiled kernels, results without a bucket."""
    work: int
    """Scratch on the node: what is made before it is published."""
    tmp: int
    weights: int
    """A server's copy of the merged weights."""
    server_memory: int
    save_seconds: int
    """The longest that storing a checkpoint may take."""
    grace_seconds: int

    @property
    def ephemeral(self) -> int:
        return self.work + self.tmp + LOGS


def needs(spec: JobSpec, sizes: Sizes, *, gpus: int) -> Needs:
    """What the job needs on a machine where it has `gpus` devices, or none."""
    workers = spec.train.dataloader_num_workers
    shared = (8 * GIB if gpus else GIB) + workers * GIB
    model = sizes.merged * ON_HOST if gpus else sizes.parameters * ON_CPU
    process = PROCESS + model if gpus else max(PROCESS + model, training_on_cpu(spec))
    drawn = all(source.uri == FORMULAS for source in spec.data.sources().values())
    data = DRAWN if drawn else DATA
    kept = (spec.train.save_total_limit + 1) * sizes.checkpoint
    save = TOTAL_SECONDS + sizes.checkpoint / UPLOAD_RATE
    return Needs(
        memory=_gib(process + workers * WORKER + shared),
        shared_memory=shared,
        cache=_gib(sizes.download * 1.1 + sizes.merged + data),
        work=_gib(sizes.merged + sizes.adapter + kept + data),
        tmp=TMP,
        weights=_gib(sizes.merged * 1.1),
        server_memory=_gib(PROCESS + sizes.merged * ON_HOST + 8 * GIB),
        save_seconds=math.ceil(save),
        grace_seconds=math.ceil((LAST_STEP + save) / 60) * 60,
    )


def training_on_cpu(spec: JobSpec) -> int:
    """What training takes of a CPU's memory, its process included; 0 where nobody can tell.

    All rows of a batch are as long as `train.max_length` allows: who asks a cluster for memory has
    read no rows, and none may be killed for the ones that come.
    """
    family, model = families.architecture(spec.model)
    rows = (longest(model, spec),) * spec.train.per_device_train_batch_size
    nowhere = Accelerator(kind="cpu", name="CPU", memory_bytes=0)  # any: nothing is held against it
    taken = estimate(family, model, spec, rows, nowhere)
    return taken.total if taken else 0


def _gib(count: float) -> int:
    return max(1, math.ceil(count / GIB)) * GIB

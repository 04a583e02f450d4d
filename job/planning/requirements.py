"""The resources that a job requires, computed from its sizes.

`plan` reports them, manifests request them, and `doctor` checks for them.
"""

import math
from dataclasses import dataclass

from job import families, storage
from job.engines.device import Accelerator
from job.engines.memory import PROCESS, estimate, longest
from job.planning.sizes import GIB, Sizes
from job.spec.types import FORMULAS, JobSpec
from job.storage.retry import TOTAL_SECONDS

WORKER_BYTES = 2 * GIB
"""Host memory per data loader worker."""
MERGE_FACTOR = 1.2
"""Host memory for merging, as a multiple of the merged weights."""
CPU_BYTES_PER_PARAMETER = 3 * 4
"""Bytes per parameter on a CPU: base, trained and merged model in fp32."""
DATA, GENERATED_DATA = 20 * GIB, 2 * GIB
"""Disk for lists and prepared rows, if their size is unknown; less if all rows are generated."""
SPARE = GIB // 4
"""Disk for logs, compiled code and temporary files, beside what is known to the byte."""
TMP = 2 * GIB
LOGS = 1 * GIB
UPLOAD_RATE = 50e6
"""The transfer rate of storage, in bytes per second, that times are based on."""
LAST_STEP_SECONDS = 120
"""Time to finish the step in progress when a stop signal arrives."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Resources in bytes and seconds, per machine or pod."""

    memory: int
    """Includes shared memory, which counts towards the pod's limit."""
    shared_memory: int
    cache: int
    """The volume that outlives the pod: downloads and compiled kernels. Without a bucket also the
    results, and the scratch space: a result is linked from there, and so takes space once."""
    work: int
    """Scratch space for files that are not published yet, unless it is on the cache volume."""
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


def needs(
    spec: JobSpec,
    sizes: Sizes,
    *,
    gpus: int,
    output: str | None = None,
    data_bytes: int | None = None,
) -> Needs:
    """The requirements on a machine with this number of GPUs.

    `output` replaces `output.uri` of the spec. `data_bytes` is the size of the prepared rows; None,
    if it is unknown, leaves room for rows of any usual size.
    """
    workers = spec.train.dataloader_num_workers
    shared = (8 * GIB if gpus else GIB) + workers * GIB
    model = sizes.merged * MERGE_FACTOR if gpus else sizes.parameters * CPU_BYTES_PER_PARAMETER
    process = PROCESS + model if gpus else max(PROCESS + model, training_on_cpu(spec))
    generated = all(source.uri == FORMULAS for source in spec.data.sources().values())
    data, disk = GENERATED_DATA if generated else DATA, _gib
    if data_bytes is not None:
        data, disk = data_bytes, _with_spare
    checkpoints = (spec.train.save_total_limit + 1) * sizes.checkpoint
    cache, scratch = sizes.download * 1.1 + data, sizes.merged + sizes.adapter + checkpoints + data
    if storage.is_local(output or spec.output.uri):
        cache += scratch + spec.train.save_total_limit * sizes.checkpoint
        scratch = 0
    save = TOTAL_SECONDS + sizes.checkpoint / UPLOAD_RATE
    return Needs(
        memory=_gib(process + workers * WORKER_BYTES + shared),
        shared_memory=shared,
        cache=disk(cache),
        work=disk(scratch),
        tmp=TMP,
        weights=_gib(sizes.merged * 1.1),
        server_memory=_gib(PROCESS + sizes.merged * MERGE_FACTOR + 8 * GIB),
        save_seconds=math.ceil(save),
        grace_seconds=math.ceil((LAST_STEP_SECONDS + save) / 60) * 60,
    )


def training_on_cpu(spec: JobSpec) -> int:
    """Peak memory of training on a CPU, its process included; 0 if it cannot be estimated.

    Assumes rows as long as `train.max_length` allows: a manifest requests memory before any row is
    read, and no row may get the pod killed.
    """
    family, model = families.architecture(spec.model)
    rows = (longest(model, spec),) * spec.train.per_device_train_batch_size
    cpu = Accelerator(kind="cpu", name="CPU", memory_bytes=0)  # the estimate does not depend on it
    memory = estimate(family, model, spec, rows, cpu)
    return memory.total if memory else 0


def _with_spare(count: float) -> int:
    return math.ceil(count) + SPARE if count else 0


def _gib(count: float) -> int:
    return max(1, math.ceil(count / GIB)) * GIB

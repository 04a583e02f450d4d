"""How training would compute a step on a device: the passes, and whether blocks are compiled."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from job.engines.device import Accelerator
from job.engines.memory import MemoryEstimate, estimate
from job.engines.padding_free import why_padded
from job.families.base import Family
from job.families.encoded import RowSize
from job.planning import facts
from job.planning.sample import worst_batch
from job.spec.types import JobSpec
from job.train.capture_choice import why_eager
from job.train.compile_choice import CompileChoice, StepWork, choose
from job.train.pass_candidates import BatchSettings, candidates, searches, without_search

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class PlannedPass:
    """The passes that training is expected to choose, with the heaviest micro-batch."""

    settings: BatchSettings
    batch: tuple[RowSize, ...]
    memory: MemoryEstimate


def planned_pass(
    family: type[Family],
    model: "PreTrainedModel",
    spec: JobSpec,
    rows: Sequence[RowSize],
    device: Accelerator,
    processes: int,
) -> PlannedPass | None:
    """The fastest passes that fit by the estimate, as the search before step 1 would find them.

    If none fits, those that need the least memory; if training does not search, the spec's. None if
    the family cannot estimate memory. `processes` divide what the spec shards.
    """
    return _Search(
        family=family, model=model, spec=spec, rows=rows, device=device, processes=processes
    ).planned()


def compile_choice(
    family: type[Family],
    spec: JobSpec,
    model: "PreTrainedModel",
    data: facts.Data,
    steps: facts.Steps,
    devices: Mapping[str, Accelerator],
) -> CompileChoice:
    """Whether blocks are compiled on the devices; on a GPU if there is any.

    Whether the image or machine that trains has a compiler is unknown here.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    work, on_gpu = None, any(device.kind != "cpu" for device in devices.values())
    if steps.total is not None and data.tokens_a_row is not None:
        work = StepWork(
            steps=steps.total,
            tokens_a_step=steps.rows_a_step * data.tokens_a_row,
            blocks=sum(isinstance(each, GradientCheckpointingLayer) for each in model.modules()),
            captured=_may_capture(family, spec, on_gpu=on_gpu),
        )
    return choose(
        spec,
        work,
        on_gpu=on_gpu,
        patches_forward=spec.model.engine == "unsloth",
    )


def _may_capture(family: type[Family], spec: JobSpec, *, on_gpu: bool) -> bool:
    padded = why_padded(spec, family, patches_forward=spec.model.engine == "unsloth")
    return why_eager(spec, on_gpu=on_gpu, padding_free=padded is None) is None


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The search for passes of a training on a device, by the estimate."""

    family: type[Family]
    model: "PreTrainedModel"
    """The architecture on the meta device."""
    spec: JobSpec
    rows: Sequence[RowSize]
    """A sample of the training's."""
    device: Accelerator
    processes: int

    def planned(self) -> PlannedPass | None:
        """See `planned_pass`."""
        planned, tried = None, self._tried()
        for settings in tried:
            if settings != tried[-1] and not self._fits_on_average(settings):
                continue
            planned = self._with_heaviest(settings)
            if planned is None or planned.memory.fits(self.device.memory_bytes):
                return planned
        return planned

    def _tried(self) -> Sequence[BatchSettings]:
        """The passes that training tries, in order; without a search, those that it takes."""
        train, on_gpu = self.spec.train, self.device.kind != "cpu"
        sharded = self.spec.shards_weights
        if searches(train, on_gpu=on_gpu, sharded=sharded):
            mean = fmean(row.tokens for row in self.rows)
            return candidates(
                train,
                lambda each: each.per_device_train_batch_size * mean,
                on_gpu=on_gpu,
                captured=_may_capture(self.family, self.spec, on_gpu=on_gpu),
            )

        def is_safe(kept: BatchSettings) -> bool:
            planned = None if sharded else self._with_heaviest(kept)
            return planned is not None and planned.memory.is_safe(self.device.memory_bytes)

        return [without_search(train, is_safe)]

    def _with_heaviest(self, settings: BatchSettings) -> PlannedPass | None:
        """The passes with their heaviest micro-batch; None if the family cannot estimate memory."""
        batch = worst_batch(self.rows, settings.per_device_train_batch_size)
        memory = self._memory(settings, batch)
        if memory is None:
            return None
        return PlannedPass(settings=settings, batch=batch, memory=memory)

    def _fits_on_average(self, settings: BatchSettings) -> bool:
        """Whether a micro-batch like the sample fits, which takes less than the heaviest."""
        size = settings.per_device_train_batch_size
        batch = tuple(itertools.islice(itertools.cycle(self.rows), size))
        memory = self._memory(settings, batch)
        return memory is None or memory.fits(self.device.memory_bytes)

    def _memory(self, settings: BatchSettings, batch: tuple[RowSize, ...]) -> MemoryEstimate | None:
        spec = replace(self.spec, train=settings.of_spec(self.spec.train))
        return estimate(self.family, self.model, spec, batch, self.device, processes=self.processes)

"""The times of a plan: of its training by recorded speeds, and of every stage by measured jobs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from job.engines.device import Accelerator
from job.planning import facts, job_time, speed
from job.planning.cost_model import measured_jobs
from job.planning.devices import THIS_MACHINE
from job.planning.scaling import Scaling, measured_scalings, scaling_of
from job.planning.sizes import Sizes
from job.planning.stage_work import Work
from job.planning.validation_cost import validation
from job.spec.types import JobSpec
from job.train.compile_choice import CompileChoice

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME_ONE = "name one accelerator to see it: --accelerator"


@dataclass(frozen=True, kw_only=True)
class TimeEstimates:
    """Estimates the times of a planned job on one of its devices."""

    spec: JobSpec
    data: facts.Data
    steps: facts.Steps
    sizes: Sizes
    memory: facts.MemoryFit | None
    compiling: CompileChoice
    devices: Mapping[str, Accelerator]
    price_per_hour: float | None
    """Of one accelerator."""

    @property
    def device(self) -> str | None:
        """The name of the device: this machine, or the only one; None if there is neither."""
        if THIS_MACHINE in self.devices:
            return THIS_MACHINE
        return next(iter(self.devices)) if len(self.devices) == 1 else None

    def work(self, config: "PretrainedConfig") -> Work | None:
        """The work of the stages on the device, for a model of this configuration; None if it is
        unknown."""
        if self.device is None:
            return None
        validated = validation(self.spec, self.data, self.steps, None)
        fit = self._fit(self.device)
        return job_time.work_of(
            self.spec,
            config,
            self.sizes,
            self.data,
            self.steps,
            passes_a_step=fit.passes if fit else self.spec.train.gradient_accumulation_steps,
            compiled=self._compiles(self.device),
            validated_rows=validated.rows * (validated.times or 0) // self.steps.processes
            if validated
            else 0,
        )

    def job(
        self, work: Work | None, *, answer_tokens: float | None, skipped: Collection[str]
    ) -> facts.JobTime | None:
        """The time of each stage, except the skipped ones, and of all; None if it is unknown.

        `answer_tokens` is the mean length of the sample's answers.
        """
        if self.device is None or work is None or self._unmeasured is not None:
            return None
        return job_time.job_time(
            measured_jobs(),
            self.devices[self.device],
            self.device,
            work,
            answer_tokens=answer_tokens,
            skipped=skipped,
            price_per_hour=self.price_per_hour,
            processes=self.steps.processes,
            scaling=self._scaling,
        )

    def training(self) -> tuple[facts.TrainingTime | None, str | None]:
        """The time and cost of the training by recorded speeds; if unknown, why."""
        data, steps, scaling = self.data, self.steps, self._scaling
        if self.device is None:
            return None, NAME_ONE
        if steps.total is None or data.tokens_a_row is None:
            return None, "the tokens per row are unknown"
        if self._unmeasured is not None:
            return None, self._unmeasured
        device, fit, train = self.devices[self.device], self._fit(self.device), self.spec.train
        rows_a_pass = fit.pass_rows if fit else train.per_device_train_batch_size
        span = speed.training_time(
            speed.measurements(),
            speed.Training(
                device=device.name,
                cores=device.cores,
                parameters=self.sizes.parameters,
                method=self.spec.lora.method,
                compiled=self._compiles(self.device),
                tokens=steps.total * steps.rows_a_step * data.tokens_a_row,
                batch_tokens=rows_a_pass * data.tokens_a_row,
            ),
        )
        if span is None and len(self.devices) > 1:
            return None, NAME_ONE
        if span is None:
            kind = "accelerator" if device.cores is None else f"CPU of {device.cores} cores"
            return None, f"no measurement for this {kind} ({device.name}) with a model of this size"
        efficiency = 1.0 if scaling is None else scaling.efficiency
        low, high = span.shortest / efficiency, span.longest / efficiency
        each = self.price_per_hour
        price = None if each is None else steps.processes * each
        return facts.TrainingTime(
            accelerator=self.device,
            shortest=round(low, 1),
            longest=round(high, 1),
            cost_from=None if price is None else round(low / 3600 * price, 2),
            cost_to=None if price is None else round(high / 3600 * price, 2),
            sources=(*span.sources, *(() if scaling is None else (scaling.source,))),
            beyond=span.beyond,
        ), None

    def _fit(self, device: str) -> facts.DeviceFit | None:
        """The passes that training is expected to choose on the device; None if unknown."""
        fits = self.memory.fits if self.memory else ()
        return next((fit for fit in fits if fit.accelerator == device), None)

    def _compiles(self, device: str) -> bool:
        return self.compiling.compiled and self.devices[device].kind != "cpu"

    @cached_property
    def _scaling(self) -> Scaling | None:
        """How the training scales to its processes, by measurement; None for one process, or if it
        was not measured."""
        processes = self.steps.processes
        if self.device is None or processes == 1 or self.spec.shards_weights:
            return None
        device = self.devices[self.device]
        if device.kind == "cpu":
            return None
        return scaling_of(measured_scalings(), device.name, processes)

    @property
    def _unmeasured(self) -> str | None:
        """Why the speed of the training's processes is unknown; None if it is known."""
        if self.device is None:
            return None
        if self.spec.shards_weights:
            return "no training with fsdp2 was measured"
        if self.steps.processes == 1 or self._scaling is not None:
            return None
        return f"several processes were not measured on {self.devices[self.device].name}"

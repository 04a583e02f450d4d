"""Makes a plan from the spec, the model's architecture, and the first rows of the data."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from job import families, storage
from job.engines.adapter_fit import require_fit
from job.engines.device import Accelerator
from job.engines.padding_free import why_padded
from job.errors import InputError, JobError, StorageError
from job.families.lora.parameter_counts import adapter_parameters
from job.families.lora.selection import trained_in_full
from job.families.lora.target_groups import SAVED
from job.pipeline.context import RunContext
from job.pipeline.runner import COMMANDS
from job.planning import data, facts, sizes, speed
from job.planning.cost_model import measured_jobs
from job.planning.devices import THIS_MACHINE, memory_fit, planned_devices
from job.planning.engine import engine_of
from job.planning.job_time import answer_tokens, job_time, training_of, work_of
from job.planning.name_patterns import patterns
from job.planning.passes import compile_choice
from job.planning.reinforcement_cost import reinforcement
from job.planning.requirements import needs
from job.planning.scaling import Scaling, measured_scalings, require_possible, scaling_of
from job.planning.stage_work import Work
from job.planning.validation_cost import validation
from job.spec.keys import path_of
from job.spec.load import LoadedSpec
from job.spec.types import JobSpec
from job.storage import retry
from job.storage.backends.hub import hub_offline_variable
from job.train.compile_choice import CompileChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

WILL_RUN = "will run"
NAME_ONE = "name one accelerator to see it: --accelerator"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `job plan`."""

    loaded: LoadedSpec
    accelerator: str | None = None
    """A name of ACCELERATORS; None for this machine's own, or for all if it has none."""
    price_per_hour: float | None = None
    """Of one accelerator."""
    processes: int | None = None
    """That train together, on an accelerator each. None for one, or for the fewest over which
    sharded weights fit."""


def make_plan(options: PlanOptions) -> facts.Plan:
    """The plan.

    Raises UsageError for an unknown accelerator, or for a number of processes that the spec does
    not allow, and InputError if the model is missing or access to it is denied. Missing data, and
    whatever is unreachable, is left unknown.
    """
    spec = options.loaded.spec
    uri = spec.model.model_name_or_path
    if options.processes is not None:
        require_possible(spec, options.processes)
    processes = options.processes or 1
    devices = planned_devices(options.accelerator, spec)
    job = RunContext(options.loaded, "plan", processes=processes)
    with retry.at_most(1):
        survey = _survey_data(job)
        # The user may lack credentials for the output here; fingerprints also need the data.
        stages, no_stages = _try(lambda: dict(_stages(job)), InputError)
    family, skeleton = families.architecture(spec.model)
    family.set_router_aux_loss(skeleton, spec.train.router_aux_loss_coef)  # may refuse, as in a run
    start, _ = _try(lambda: job.start_adapter)  # unknown if it is unreachable
    if start is not None:
        require_fit(start, spec.lora, lambda lora: family.lora_targets(skeleton, lora))
    data_facts = data.data_facts(spec, survey)
    steps = _steps(spec, data_facts, processes)
    measured = sizes.measure(spec)
    memory = memory_fit(family, skeleton, spec, survey.sizes, devices, options.processes)
    compiling = compile_choice(family, spec, skeleton, data_facts, steps, devices)
    timed = _timed(devices)
    scaling, unmeasured = (None, None) if timed is None else _scaling(options, devices[timed])
    work = _Work(
        data=data_facts,
        steps=steps,
        sizes=measured,
        memory=memory,
        compiling=compiling,
        scaling=scaling,
        unmeasured=unmeasured,
    )
    quantities, whole = _job_time(options, devices, work, skeleton, survey, stages or {})
    time, no_time = _time(options, devices, work)
    if whole is not None:
        time, no_time = training_of(whole) or time, None
    return facts.Plan(
        name=spec.name,
        output=spec.output.uri,
        settings={path: _value(options.loaded, path) for path in options.loaded.changed},
        data=data_facts,
        steps=steps,
        model=_model(family, skeleton, spec, measured, devices, str(compiling)),
        memory=memory,
        memory_unknown=None if memory else f"the activation memory of the family {family.name}",
        disk=facts.Disk(
            download=0 if storage.is_local(uri) else measured.download,
            prepared=data.prepared_bytes(spec.data, data_facts, survey),
            checkpoints=_trainings(spec) * (spec.train.save_total_limit + 1) * measured.checkpoint,
            adapter=measured.adapter,
            merged=measured.merged,
        ),
        pods=tuple(_pods(spec, measured, processes)),
        time=time,
        time_unknown=no_time,
        job_time=whole,
        work=None if quantities is None else asdict(quantities),
        validation=validation(spec, data_facts, steps, time),
        reinforcement=reinforcement(
            family,
            spec,
            skeleton,
            data_facts,
            survey.sizes,
            quantities,
            devices,
            answer_tokens=answer_tokens(survey),
            trainable=measured.trainable,
        ),
        stages=stages or {},
        stages_unknown=data.reason(no_stages),
    )


def _trainings(spec: JobSpec) -> int:
    """The number of stages that store checkpoints."""
    return (spec.train.max_steps != 0) + (spec.reinforce is not None)


def _survey_data(job: RunContext) -> data.DataSurvey:
    """Counts and samples the data, as far as storage and the hub are reachable."""
    uri = job.spec.model.model_name_or_path
    # A model known by name can be planned for even in the hub's offline mode.
    offline = hub_offline_variable(uri) is not None and families.is_known(uri)
    family, no_family = _try(lambda: _family(job), *((InputError,) if offline else ()))
    counts, no_counts = _try(lambda: data.count_rows(job), InputError)
    samples, splits, no_samples = None, None, no_family or no_counts
    if family is not None and counts is not None:
        samples, no_samples = _try(lambda: data.sample_rows(job, family), InputError)
        if samples is not None:
            splits, _ = _try(lambda: data.split_rows(job, counts, samples), InputError)
    lost = [error for error in (no_counts, no_samples) if error is not no_family]
    return data.DataSurvey(
        counts=counts,
        samples=samples,
        splits=splits,
        unknown=no_counts or no_samples,
        missing=next((error for error in lost if isinstance(error, InputError)), None),
    )


def _try(ask: Callable[[], T], *also: type[JobError]) -> tuple[T | None, JobError | None]:
    """The result of `ask`, or the error, if it is a StorageError or one of `also`."""
    expected: tuple[type[JobError], ...] = (StorageError, *also)
    try:
        return ask(), None
    except expected as error:
        return None, error


def _family(job: RunContext) -> families.Family:
    """The family with its tokenizer, from the checkpoint's small files."""
    return job.bind_headers()


def _steps(spec: JobSpec, data: facts.Data, processes: int) -> facts.Steps:
    train = spec.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    total: int | None = train.max_steps if train.max_steps >= 0 else None
    per_epoch = epochs = None
    if data.train_rows is not None:
        per_epoch = math.ceil(data.train_rows / (rows * processes))
        total = math.ceil(per_epoch * train.num_train_epochs) if total is None else total
        epochs = round(total / max(1, per_epoch), 2)
    return facts.Steps(
        rows_a_step=rows, processes=processes, total=total, an_epoch=per_epoch, epochs=epochs
    )


def _model(
    family: type[families.Family],
    skeleton: "PreTrainedModel",
    spec: JobSpec,
    measured: sizes.Sizes,
    devices: Mapping[str, Accelerator],
    compiled: str,
) -> facts.Model:
    groups = []
    if spec.lora.method == "lora":
        targets = family.lora_targets(skeleton, spec.lora)
        for group in targets.groups:
            groups.append(
                facts.Group(
                    name=group.name,
                    tensors=len(group),
                    trainable=adapter_parameters(skeleton, group, spec.lora),
                    patterns=tuple(patterns((*group.modules, *group.parameters))),
                )
            )
        if saved := trained_in_full(skeleton, targets):
            groups.append(
                facts.Group(
                    name=SAVED,
                    tensors=len(saved),
                    trainable=sum(parameter.numel() for parameter in saved.values()),
                    patterns=tuple(patterns(targets.saved_modules)),
                )
            )
    return facts.Model(
        family=family.name,
        uri=spec.model.model_name_or_path,
        adapter=spec.model.adapter_name_or_path,
        parameters=measured.parameters,
        trainable=measured.trainable,
        groups=tuple(groups),
        served=str(family.adapter_serving(spec.lora)) if groups else None,
        engine=engine_of(spec, family.name, devices),
        padded=why_padded(spec, family, patches_forward=spec.model.engine == "unsloth")
        if spec.train.padding_free
        else None,
        compiled=compiled,
    )


def _pods(spec: JobSpec, measured: sizes.Sizes, processes: int) -> Iterator[facts.Pod]:
    of_gpus = "with a GPU" if processes == 1 else f"with {processes} GPUs"
    for name, gpus in ((of_gpus, processes), ("on CPUs", 0)):
        pod = needs(spec, measured, gpus=gpus)
        yield facts.Pod(
            name=name,
            memory=pod.memory,
            shared_memory=pod.shared_memory,
            scratch=pod.ephemeral,
            cache=pod.cache,
        )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the time of training depends on, other than the device."""

    data: facts.Data
    steps: facts.Steps
    sizes: sizes.Sizes
    memory: facts.MemoryFit | None
    compiling: CompileChoice
    scaling: Scaling | None
    """What was measured of several processes, if there are to be some."""
    unmeasured: str | None
    """Why no time is known of the processes."""

    def rows_a_pass(self, device: str, spec: JobSpec) -> int:
        """As chosen for the device, or the spec's if that is unknown."""
        fits = self.memory.fits if self.memory else ()
        chosen = (fit.pass_rows for fit in fits if fit.accelerator == device)
        return next(chosen, spec.train.per_device_train_batch_size)

    def passes_a_step(self, device: str, spec: JobSpec) -> int:
        """The same of the passes of a step."""
        fits = self.memory.fits if self.memory else ()
        chosen = (fit.passes for fit in fits if fit.accelerator == device)
        return next(chosen, spec.train.gradient_accumulation_steps)


def _timed(devices: Mapping[str, Accelerator]) -> str | None:
    """The device whose times are told: this machine, or the only one; None if there is neither."""
    if THIS_MACHINE in devices:
        return THIS_MACHINE
    return next(iter(devices)) if len(devices) == 1 else None


def _time(
    options: PlanOptions, devices: Mapping[str, Accelerator], work: _Work
) -> tuple[facts.TrainingTime | None, str | None]:
    """The time and cost of training; if unknown, why."""
    data, steps, scaling = work.data, work.steps, work.scaling
    name = _timed(devices)
    if name is None:
        return None, NAME_ONE
    if steps.total is None or data.tokens_a_row is None:
        return None, "the tokens per row are unknown"
    if work.unmeasured is not None:
        return None, work.unmeasured
    device = devices[name]
    spec = options.loaded.spec
    span = speed.training_time(
        speed.measurements(),
        speed.Training(
            device=device.name,
            cores=device.cores,
            parameters=work.sizes.parameters,
            method=spec.lora.method,
            compiled=work.compiling.compiled and device.kind != "cpu",
            tokens=steps.total * steps.rows_a_step * data.tokens_a_row,
            batch_tokens=work.rows_a_pass(name, spec) * data.tokens_a_row,
        ),
    )
    if span is None and len(devices) > 1:
        return None, NAME_ONE
    if span is None:
        kind = "accelerator" if device.cores is None else f"CPU of {device.cores} cores"
        return None, f"no measurement for this {kind} ({device.name}) with a model of this size"
    efficiency = 1.0 if scaling is None else scaling.efficiency
    low, high = span.shortest / efficiency, span.longest / efficiency
    each = options.price_per_hour
    price = None if each is None else steps.processes * each
    return facts.TrainingTime(
        accelerator=name,
        shortest=round(low, 1),
        longest=round(high, 1),
        cost_from=None if price is None else round(low / 3600 * price, 2),
        cost_to=None if price is None else round(high / 3600 * price, 2),
        sources=(*span.sources, *(() if scaling is None else (scaling.source,))),
        beyond=span.beyond,
    ), None


def _scaling(options: PlanOptions, device: Accelerator) -> tuple[Scaling | None, str | None]:
    """What was measured of several processes, if there are to be some; if nothing, why not."""
    processes, kind = options.processes or 1, options.loaded.spec.runtime.distributed
    if kind == "fsdp2":
        return None, "no training with fsdp2 was measured"
    if processes == 1:
        return None, None
    found = (
        None if device.kind == "cpu" else scaling_of(measured_scalings(), device.name, processes)
    )
    return found, None if found else f"several processes were not measured on {device.name}"


def _job_time(
    options: PlanOptions,
    devices: Mapping[str, Accelerator],
    work: _Work,
    model: "PreTrainedModel",
    survey: data.DataSurvey,
    stages: Mapping[str, str],
) -> tuple[Work | None, facts.JobTime | None]:
    """What the stages have to do on this machine, or on the accelerator that the user names, and
    how long that takes; None if that is not known."""
    name = _timed(devices)
    if name is None:
        return None, None
    spec = options.loaded.spec
    validated = validation(spec, work.data, work.steps, None)
    quantities = work_of(
        spec,
        model.config,
        work.sizes,
        work.data,
        work.steps,
        passes_a_step=work.passes_a_step(name, spec),
        compiled=work.compiling.compiled and devices[name].kind != "cpu",
        validated_rows=validated.rows * (validated.times or 0) // work.steps.processes
        if validated
        else 0,
    )
    if quantities is None or work.unmeasured is not None:
        return quantities, None
    return quantities, job_time(
        measured_jobs(),
        devices[name],
        name,
        quantities,
        answer_tokens=answer_tokens(survey),
        skipped=[stage for stage, state in stages.items() if state != WILL_RUN],
        price_per_hour=options.price_per_hour,
        processes=work.steps.processes,
        scaling=work.scaling,
    )


def _stages(job: RunContext) -> Iterator[tuple[str, str]]:
    for stage in COMMANDS["run"]:
        if stage == "baseline" and not job.spec.eval.baseline:
            yield stage, "off (eval.baseline: false)"
            continue
        if stage == "reinforce" and job.spec.reinforce is None:
            continue
        if stage == "push" and not job.spec.export.push_to_hub:
            yield stage, "off (export.push_to_hub: false)"
            continue
        if stage == "train":
            job.keep_trained()
        # Without a marker it will run; computing the fingerprint would read all data for nothing.
        marked = job.output.stages.markers.exists(stage)
        record = job.output.stages.completed(stage, job.fingerprint(stage)) if marked else None
        if record is not None:
            job.record.add(record)  # the fingerprint of the report needs it
        yield stage, f"complete since {record.started}; will be skipped" if record else WILL_RUN


def _value(loaded: LoadedSpec, path: str) -> object:
    value: Any = loaded.resolved
    for key in path_of(path):
        value = value[key]
    return value

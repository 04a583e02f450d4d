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
from job.planning import data, facts, sizes
from job.planning.devices import memory_fit, planned_devices
from job.planning.engine import engine_of
from job.planning.job_time import answer_tokens, training_of
from job.planning.name_patterns import patterns
from job.planning.passes import compile_choice
from job.planning.reinforcement_cost import reinforcement
from job.planning.requirements import needs
from job.planning.scaling import require_possible
from job.planning.time_estimates import TimeEstimates
from job.planning.validation_cost import validation
from job.spec.keys import path_of
from job.spec.load import LoadedSpec
from job.spec.types import JobSpec
from job.storage import retry
from job.storage.backends.hub import hub_offline_variable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

WILL_RUN = "will run"


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
    estimates = TimeEstimates(
        spec=spec,
        data=data_facts,
        steps=steps,
        sizes=measured,
        memory=memory,
        compiling=compiling,
        devices=devices,
        price_per_hour=options.price_per_hour,
    )
    sampled_answers = answer_tokens(survey)
    skipped = [stage for stage, state in (stages or {}).items() if state != WILL_RUN]
    work = estimates.work(skeleton.config)
    whole_job = estimates.job(work, answer_tokens=sampled_answers, skipped=skipped)
    time, no_time = estimates.training()
    if whole_job is not None:
        time, no_time = training_of(whole_job) or time, None
    return facts.Plan(
        name=spec.name,
        output=spec.output.uri,
        settings={path: _value(options.loaded, path) for path in options.loaded.changed},
        data=data_facts,
        steps=steps,
        model=_model(family, skeleton, spec, measured, devices, str(compiling)),
        memory=memory,
        memory_unknown=None if memory else f"the activation memory of the family {family.name}",
        disk=_disk(spec, measured, data.prepared_bytes(spec.data, data_facts, survey)),
        pods=tuple(_pods(spec, measured, processes)),
        time=time,
        time_unknown=no_time,
        job_time=whole_job,
        work=None if work is None else asdict(work),
        validation=validation(spec, data_facts, steps, time),
        reinforcement=reinforcement(
            family,
            spec,
            skeleton,
            data_facts,
            survey.sizes,
            work,
            devices,
            answer_tokens=sampled_answers,
            trainable=measured.trainable,
        ),
        stages=stages or {},
        stages_unknown=data.reason(no_stages),
    )


def _disk(spec: JobSpec, measured: sizes.Sizes, prepared: int | None) -> facts.Disk:
    storing = (spec.train.max_steps != 0) + (spec.reinforce is not None)  # stages with checkpoints
    return facts.Disk(
        download=0 if storage.is_local(spec.model.model_name_or_path) else measured.download,
        prepared=prepared,
        checkpoints=storing * (spec.train.save_total_limit + 1) * measured.checkpoint,
        adapter=measured.adapter,
        merged=measured.merged,
    )


def _survey_data(job: RunContext) -> data.DataSurvey:
    """Counts and samples the data, as far as storage and the hub are reachable."""
    uri = job.spec.model.model_name_or_path
    # A model known by name can be planned for even in the hub's offline mode.
    offline = hub_offline_variable(uri) is not None and families.is_known(uri)
    family, no_family = _try(job.bind_headers, *((InputError,) if offline else ()))
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


def _steps(spec: JobSpec, data: facts.Data, processes: int) -> facts.Steps:
    train, rows = spec.train, spec.train.rows_a_step
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

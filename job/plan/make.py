"""Gathers a plan's facts: from the spec, the model's architecture, and the data's first rows."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from job import families, inputs, sizes, storage
from job.engines.device import Accelerator, detect, resolve_dtype
from job.errors import StorageError, UsageError
from job.families.ernie45_vl import Ernie45VL
from job.families.ernie45_vl.targets import resolve
from job.memory import UNCERTAINTY, estimate
from job.needs import needs
from job.pipeline import COMMANDS, Pipeline
from job.plan import facts, sample, speed
from job.plan.accelerators import ACCELERATORS
from job.plan.fit import nearest_change
from job.plan.patterns import patterns
from job.prep import sources
from job.spec.load import LoadedSpec
from job.spec.names import nearest
from job.spec.types import JobSpec
from job.storage import retry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

THIS = "this machine"
ASK = "name one accelerator to see it: --accelerator"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a plan is made for."""

    loaded: LoadedSpec
    accelerator: str | None = None
    """A name of ACCELERATORS; None is the machine's own, or all where it has none."""
    price_per_hour: float | None = None


def make(order: Order) -> facts.Plan:
    """The plan.

    Raises UsageError for an accelerator that is not known, and InputError where an input is missing
    or denied. What cannot be reached is left unknown.
    """
    spec = order.loaded.spec
    uri = spec.model.model_name_or_path
    devices = _devices(order.accelerator, spec)
    pipeline = Pipeline(order.loaded, "plan")
    with retry.at_most(1):
        family, no_family = _reach(lambda: _family(pipeline))
        counts, no_counts = _reach(lambda: _count(pipeline))
        taken, no_sample = None, no_family or no_counts
        if family is not None and counts is not None:
            source = pipeline.train_source
            taken, no_sample = _reach(lambda: sample.take(source, family, spec))
        stages, no_stages = _reach(lambda: dict(_stages(pipeline)))
    skeleton = family.skeleton() if family else sizes.architecture(spec.model)
    data = _data(spec, counts, taken, no_counts or no_sample)
    steps = _steps(spec, data)
    measured = sizes.measure(spec)
    memory = _memory(skeleton, spec, taken, devices)
    time, no_time = _time(order, memory, data, steps, measured)
    return facts.Plan(
        name=spec.name,
        output=spec.output.uri,
        settings={path: _value(order.loaded, path) for path in order.loaded.changed},
        data=data,
        steps=steps,
        model=_model(skeleton, spec, measured),
        memory=memory,
        disk=facts.Disk(
            download=0 if storage.is_local(uri) else measured.download,
            prepared=_prepared(data, taken),
            checkpoints=(spec.train.save_total_limit + 1) * measured.checkpoint,
            adapter=measured.adapter,
            merged=measured.merged,
        ),
        pods=tuple(_pods(spec, measured)),
        time=time,
        time_unknown=no_time,
        stages=stages or {},
        stages_unknown=no_stages,
    )


def _reach(ask: Callable[[], T]) -> tuple[T | None, str | None]:
    """What storage says, or why it could not be asked."""
    try:
        return ask(), None
    except StorageError as error:
        problem = error.problems[0]
        return None, f"{problem.field} {problem.message}"


def _devices(name: str | None, spec: JobSpec) -> dict[str, Accelerator]:
    """The accelerator to plan for: the named one, the machine's own, or all with its CPU."""
    if name is not None:
        if name not in ACCELERATORS:
            close = nearest(name, ACCELERATORS)
            raise UsageError(
                "--accelerator",
                "is not known",
                value=name,
                fix=f"{f'try {close}; ' if close else ''}known: {', '.join(ACCELERATORS)}",
            )
        return {name: ACCELERATORS[name].device()}
    own = detect(replace(spec.runtime, accelerator="auto"))
    if own.kind != "cpu" or spec.runtime.accelerator == "cpu":
        return {THIS: own}
    others = {
        name: model.device()
        for name, model in ACCELERATORS.items()
        if spec.runtime.accelerator in ("auto", model.kind)
    }
    return {**({THIS: own} if spec.runtime.accelerator == "auto" else {}), **others}


def _family(pipeline: Pipeline) -> families.Family:
    """The family with its tokenizer, from the checkpoint's small files."""
    directory = inputs.fetch_headers(pipeline.model_input, pipeline.cache_dir)
    return pipeline.bind(directory, pipeline.model_input.uri)


def _count(pipeline: Pipeline) -> tuple[int, int | None]:
    """Rows of the training source, and of the evaluation source where there is one."""
    spec = pipeline.spec.data
    train = sources.count(pipeline.train_source, spec.train)
    if pipeline.eval_source is None or spec.eval is None:
        return train, None
    return train, sources.count(pipeline.eval_source, spec.eval)


def _data(
    spec: JobSpec,
    counts: tuple[int, int | None] | None,
    taken: sample.Sample | None,
    unknown: str | None,
) -> facts.Data:
    train = held_out = None
    if counts is not None:
        train, held_out = counts
        if held_out is None:
            held_out = round(train * spec.data.eval_fraction)
            train -= held_out
    an_epoch = None
    if taken is not None and train is not None:
        an_epoch = round(train * taken.usable_share * taken.tokens_a_row)
    sizes = taken.sizes if taken else ()
    return facts.Data(
        train_uri=spec.data.train.uri,
        train_rows=train,
        held_out_rows=held_out,
        exact=spec.data.eval is not None,
        asked=spec.eval.max_samples,
        sampled=taken.read if taken else 0,
        refused=len(taken.refused) if taken else 0,
        first_refusal=f"{taken.refused[0].id}: {taken.refused[0].reason}"
        if taken and taken.refused
        else None,
        too_long=taken.too_long if taken else 0,
        tokens_a_row=round(taken.tokens_a_row, 1) if sizes and taken else None,
        longest_row=max((size.tokens for size in sizes), default=None),
        tokens_an_epoch=an_epoch,
        unknown=unknown,
    )


def _steps(spec: JobSpec, data: facts.Data) -> facts.Steps:
    train = spec.train
    a_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    total: int | None = train.max_steps if train.max_steps > 0 else None
    an_epoch = math.ceil(data.train_rows / a_step) if data.train_rows is not None else None
    if total is None and an_epoch is not None:
        total = math.ceil(an_epoch * train.num_train_epochs)
    known = total is not None and an_epoch is not None
    return facts.Steps(
        rows_a_step=a_step,
        total=total,
        an_epoch=an_epoch,
        epochs=round(total / max(1, an_epoch), 2) if known else None,  # type: ignore[operator, type-var]
    )


def _model(skeleton: "PreTrainedModel", spec: JobSpec, measured: sizes.Sizes) -> facts.Model:
    groups = []
    if spec.lora.method == "lora":
        for group in resolve(skeleton, spec.lora).groups:
            groups.append(
                facts.Group(
                    name=group.name,
                    tensors=len(group),
                    trainable=sizes.adapter_parameters(skeleton, group, spec.lora.r),
                    patterns=tuple(patterns((*group.modules, *group.parameters))),
                )
            )
    return facts.Model(
        family=Ernie45VL.name,
        uri=spec.model.model_name_or_path,
        parameters=measured.parameters,
        trainable=measured.trainable,
        groups=tuple(groups),
        served=str(Ernie45VL.adapter_serving(spec.lora)) if groups else None,
    )


def _memory(
    skeleton: "PreTrainedModel",
    spec: JobSpec,
    taken: sample.Sample | None,
    devices: Mapping[str, Accelerator],
) -> facts.Memory:
    rows = spec.train.per_device_train_batch_size
    longest = sample.longest(skeleton, spec)
    weighed = taken.sizes if taken and taken.sizes else (longest,)
    batch = sample.worst_batch(weighed, rows)
    fits, largest = [], max(devices.values(), key=lambda device: device.memory_bytes)
    for name, device in devices.items():
        memory = estimate(skeleton, spec, batch, device)
        fits.append(
            facts.Fit(
                accelerator=name,
                title=device.name,
                memory=device.memory_bytes,
                fits=memory.fits(device.memory_bytes),
                tight=memory.is_tight(device.memory_bytes),
                dtype=str(resolve_dtype(spec.model, spec.lora, device)).removeprefix("torch."),
                parts=vars(memory),
                total=memory.total,
                at_max_length=estimate(skeleton, spec, (longest,) * rows, device).total,
            )
        )
    change = None
    if not any(fit.fits for fit in fits):
        change = nearest_change(skeleton, spec, weighed, largest)
    return facts.Memory(
        batch_rows=rows,
        batch_tokens=sum(size.tokens for size in batch),
        batch_patches=sum(sum(size.patches) for size in batch),
        basis="sample" if taken and taken.sizes else "max_length",
        uncertainty=UNCERTAINTY,
        fits=tuple(fits),
        change=change.settings if change else None,
        change_total=change.memory.total if change else None,
    )


def _prepared(data: facts.Data, taken: sample.Sample | None) -> int | None:
    """Prepared rows hold the pictures as they came."""
    if taken is None or data.train_rows is None:
        return None
    rows = data.train_rows + (data.held_out_rows or 0)
    return round(rows * taken.stored_bytes / max(1, taken.read))


def _pods(spec: JobSpec, measured: sizes.Sizes) -> Iterator[facts.Pod]:
    for name, gpus in (("with a GPU", 1), ("on CPUs", 0)):
        found = needs(spec, measured, gpus=gpus)
        yield facts.Pod(
            name=name,
            memory=found.memory,
            shared_memory=found.shared_memory,
            scratch=found.ephemeral,
            cache=found.cache,
        )


def _time(
    order: Order,
    memory: facts.Memory,
    data: facts.Data,
    steps: facts.Steps,
    measured: sizes.Sizes,
) -> tuple[facts.Duration | None, str | None]:
    own = [fit for fit in memory.fits if fit.accelerator == THIS]
    if len(memory.fits) > 1 and not own:
        return None, ASK
    if steps.total is None or data.tokens_a_row is None:
        return None, "the tokens of a row are not known"
    [fit] = own or memory.fits
    spec = order.loaded.spec
    found = speed.training_time(
        speed.measurements(),
        device=fit.title,
        parameters=measured.parameters,
        trained=spec.lora.method,
        tokens=steps.total * steps.rows_a_step * data.tokens_a_row,
        tokens_a_pass=spec.train.per_device_train_batch_size * data.tokens_a_row,
    )
    if found is None and len(memory.fits) > 1:
        return None, ASK
    if found is None:
        return None, f"no measurement for this accelerator ({fit.title}) with a model of this size"
    hour = order.price_per_hour
    return facts.Duration(
        accelerator=fit.accelerator,
        shortest=round(found.shortest, 1),
        longest=round(found.longest, 1),
        cost_from=None if hour is None else round(found.shortest / 3600 * hour, 2),
        cost_to=None if hour is None else round(found.longest / 3600 * hour, 2),
        sources=found.sources,
        beyond=found.beyond,
    ), None


def _stages(pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    for stage in COMMANDS["run"]:
        if stage == "baseline" and not pipeline.spec.eval.baseline:
            yield stage, "off (eval.baseline: false)"
            continue
        record = pipeline.output.completed(stage, pipeline.fingerprint(stage))
        if record is not None:
            pipeline.record.add(record)  # the report's fingerprint asks for them
        yield stage, f"complete since {record.started}; will be skipped" if record else "will run"


def _value(loaded: LoadedSpec, path: str) -> Any:
    found: Any = loaded.resolved
    for key in path.split("."):
        found = found[key]
    return found

"""Gathers a plan's facts: from the spec, the model's architecture, and the data's first rows."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from job import families, storage
from job.engines.device import Accelerator, detect, resolve_dtype
from job.errors import InputError, JobError, StorageError, UsageError
from job.evaluation import answer_lengths as lengths_of_answers
from job.families import model_source
from job.families.base import RowSize
from job.pipeline.runner import COMMANDS
from job.pipeline.stages import Stages
from job.planning import facts, sample, sizes, speed
from job.planning.accelerators import ACCELERATORS
from job.planning.engine import engine_of
from job.planning.feasibility import nearest_change
from job.planning.memory import UNCERTAINTY, estimate, longest
from job.planning.name_patterns import patterns
from job.planning.requirements import needs
from job.prep import chunks, mixture, sources
from job.prep.shards import BESIDE_PICTURES
from job.prep.streaming import kept_shards
from job.spec.foreign_names import nearest
from job.spec.keys import path_of
from job.spec.load import LoadedSpec
from job.spec.types import DataSpec, JobSpec
from job.storage import retry
from job.storage.connect import hub_forbidden_by

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

    Raises UsageError for an accelerator that is not known, and InputError where the model is
    missing or denied. Data that is, and what cannot be reached, is left unknown.
    """
    spec = order.loaded.spec
    uri = spec.model.model_name_or_path
    devices = _devices(order.accelerator, spec)
    job = Stages(order.loaded, "plan")
    with retry.at_most(1):
        # Known by its name, its sizes are told where the hub may not be asked.
        forbidden = hub_forbidden_by(uri) is not None and families.is_known(uri)
        family, no_family = _reach(lambda: _family(job), *((InputError,) if forbidden else ()))
        counts, no_counts = _reach(lambda: _count(job), InputError)
        taken, no_sample = None, no_family or no_counts
        if family is not None and counts is not None:
            taken, no_sample = _reach(lambda: _samples(job, family), InputError)
        lost = [error for error in (no_counts, no_sample) if error is not no_family]
        no_data = next((error for error in lost if isinstance(error, InputError)), None)
        # A laptop need not have keys to the output; their fingerprints ask for the data too.
        stages, no_stages = _reach(lambda: dict(_stages(job)), InputError)
    kind, skeleton = families.architecture(spec.model)
    kind.set_router_aux_loss(skeleton, spec.train.router_aux_loss_coef)  # refused like by a run
    data = _data(spec, counts, taken, no_counts or no_sample, no_data)
    steps = _steps(job, data)
    measured = sizes.measure(spec)
    weighed = tuple(size for each in taken or () for size in each.sizes)
    memory = _memory(kind, skeleton, spec, weighed, devices)
    time, no_time = _time(order, devices, data, steps, measured)
    return facts.Plan(
        name=spec.name,
        output=spec.output.uri,
        settings={path: _value(order.loaded, path) for path in order.loaded.changed},
        data=data,
        steps=steps,
        model=_model(kind, skeleton, spec, measured, devices),
        memory=memory,
        memory_unknown=None if memory else f"what a step of the family {kind.name} keeps",
        disk=facts.Disk(
            download=0 if storage.is_local(uri) else measured.download,
            prepared=_prepared(spec.data, data, taken),
            checkpoints=(spec.train.save_total_limit + 1) * measured.checkpoint,
            adapter=measured.adapter,
            merged=measured.merged,
        ),
        pods=tuple(_pods(spec, measured)),
        time=time,
        time_unknown=no_time,
        stages=stages or {},
        stages_unknown=_said(no_stages),
    )


def _reach(ask: Callable[[], T], *also: type[JobError]) -> tuple[T | None, JobError | None]:
    """What storage says, or why it could not be asked."""
    unreached: tuple[type[JobError], ...] = (StorageError, *also)
    try:
        return ask(), None
    except unreached as error:
        return None, error


def _said(error: JobError | None) -> str | None:
    return None if error is None else f"{error.problems[0].field} {error.problems[0].message}"


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


def _family(job: Stages) -> families.Family:
    """The family with its tokenizer, from the checkpoint's small files."""
    directory = model_source.fetch_headers(job.given.model, job.cache_dir, job.cache_limit)
    return job.bind(directory, job.given.model.uri)


def _count(job: Stages) -> tuple[list[int], int | None, bool]:
    """Rows of each training source, and of the evaluation source where there is one; at the end
    whether all of them were counted."""
    places = job.spec.data.sources()
    told = [sources.about(found, places[place]) for place, found in job.given.sources.items()]
    rows, counted = [n for n, _ in told], all(counted for _, counted in told)
    held_out = rows.pop() if job.given.eval_source is not None else None
    return rows, held_out, counted


def _samples(job: Stages, family: families.Family) -> tuple[sample.Sample, ...]:
    """The first rows of each training source."""
    spec = job.spec
    named = list(spec.data.sources().items())[: len(spec.data.train)]
    found = job.given.sources
    return tuple(sample.take(found[place], source, place, family, spec) for place, source in named)


def _data(
    spec: JobSpec,
    counts: tuple[list[int], int | None, bool] | None,
    taken: Sequence[sample.Sample] | None,
    unknown: JobError | None,
    missing: InputError | None,
) -> facts.Data:
    rows: Sequence[int | None] = [None] * len(spec.data.train)
    an_epoch: Sequence[int | None] = rows
    train = held_out = tokens = None
    counted = False
    if counts is not None:
        found, held_out, counted = counts
        if held_out is None:
            held_out = round(sum(found) * spec.data.eval_fraction)
            found = [count - round(count * spec.data.eval_fraction) for count in found]
        weights = [source.weight for source in spec.data.train]
        mixed = mixture.counts(found, weights, spec.data.stopping_strategy)
        rows, an_epoch, train = found, mixed, sum(mixed)
        if taken is not None:
            usable = sum(n * each.usable_share for n, each in zip(mixed, taken, strict=True))
            tokens = sum(n * each.tokens for n, each in zip(mixed, taken, strict=True))
    refused = [reject for each in taken or () for reject in each.refused]
    images = [count for each in taken or () for count in each.images]
    lengths = [size.tokens for each in taken or () for size in each.sizes]
    answers = [length for each in taken or () for length in each.answers]
    most = lengths_of_answers.limit(spec.eval.generation, answers)
    return facts.Data(
        sources=tuple(
            facts.Source(uri=source.uri, rows=n, rows_an_epoch=m)
            for source, n, m in zip(spec.data.train, rows, an_epoch, strict=True)
        ),
        train_rows=train,
        held_out_rows=held_out,
        exact=counted and spec.data.eval is not None,
        asked=spec.eval.max_samples,
        sampled=sum(each.read for each in taken or ()),
        refused=len(refused),
        first_refusal=f"{refused[0].id}: {refused[0].reason}" if refused else None,
        too_long=sum(each.too_long for each in taken or ()),
        question=spec.data.question,
        images_a_row=round(sum(images) / len(images), 2) if images else None,
        rows_without_image=images.count(0),
        tokens_a_row=round(tokens / usable, 1) if tokens else None,
        longest_row=max(lengths, default=None),
        tokens_an_epoch=None if tokens is None else round(tokens),
        longest_answer=max(answers, default=None),
        max_new_tokens=most if answers else None,
        answers_too_long=lengths_of_answers.too_long(answers, most) / max(1, len(answers)),
        unknown=_said(unknown),
        missing=missing.problems if missing else (),
        warning=_warning(taken or ()),
    )


def _warning(taken: Sequence[sample.Sample]) -> str | None:
    """Why training will refuse the data, if rows are all as those of the sample."""
    if not any(each.too_long for each in taken) or any(each.sizes for each in taken):
        return None
    return (
        "no sampled row would train, as rows are longer than train.max_length: training will "
        "refuse them with exit code 11; raise max_length, or lower data.max_pixels"
    )


def _steps(job: Stages, data: facts.Data) -> facts.Steps:
    train, a_step = job.spec.train, job.given.rows_a_step
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


def _model(
    family: type[families.Family],
    skeleton: "PreTrainedModel",
    spec: JobSpec,
    measured: sizes.Sizes,
    devices: Mapping[str, Accelerator],
) -> facts.Model:
    groups = []
    if spec.lora.method == "lora":
        for group in family.lora_targets(skeleton, spec.lora).groups:
            groups.append(
                facts.Group(
                    name=group.name,
                    tensors=len(group),
                    trainable=sizes.adapter_parameters(skeleton, group, spec.lora.r),
                    patterns=tuple(patterns((*group.modules, *group.parameters))),
                )
            )
    return facts.Model(
        family=family.name,
        uri=spec.model.model_name_or_path,
        parameters=measured.parameters,
        trainable=measured.trainable,
        groups=tuple(groups),
        served=str(family.adapter_serving(spec.lora)) if groups else None,
        engine=engine_of(spec, family.name, devices),
        padded=spec.train.padding_free and not family.packs,
    )


def _memory(
    family: type[families.Family],
    skeleton: "PreTrainedModel",
    spec: JobSpec,
    sampled: Sequence[RowSize],
    devices: Mapping[str, Accelerator],
) -> facts.Memory | None:
    """What training takes on each device; None where the family cannot tell."""
    rows = spec.train.per_device_train_batch_size
    longest_row = longest(skeleton, spec)
    weighed = sampled or (longest_row,)
    batch = sample.worst_batch(weighed, rows)
    fits, largest = [], max(devices.values(), key=lambda device: device.memory_bytes)
    for name, device in devices.items():
        memory = estimate(family, skeleton, spec, batch, device)
        at_longest = estimate(family, skeleton, spec, (longest_row,) * rows, device)
        if memory is None or at_longest is None:
            return None
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
                at_max_length=at_longest.total,
            )
        )
    change = None
    if not any(fit.fits for fit in fits):
        change = nearest_change(family, skeleton, spec, weighed, largest)
    return facts.Memory(
        batch_rows=rows,
        batch_tokens=sum(size.tokens for size in batch),
        batch_patches=sum(sum(size.patches) for size in batch),
        basis="sample" if sampled else "max_length",
        uncertainty=UNCERTAINTY,
        fits=tuple(fits),
        change=change.settings if change else None,
        change_total=change.memory.total if change else None,
    )


def _prepared(
    spec: DataSpec, data: facts.Data, taken: Sequence[sample.Sample] | None
) -> int | None:
    """Prepared rows hold the pictures as they came; of each source once, however it is mixed.

    Of those that are streamed only a part is there at a time.
    """
    if taken is None or data.train_rows is None:
        return None
    each = [found.stored_bytes / max(1, found.read) for found in taken]
    mean = sum(each) / len(each)
    stored = sum(n * (source.rows or 0) for n, source in zip(each, data.sources, strict=True))
    if spec.streaming:
        stored = min(stored, kept_shards(spec, chunks.ROWS) * chunks.ROWS * mean)
    held_out = data.held_out_rows or 0
    rows = held_out + sum(source.rows or 0 for source in data.sources)
    return round(stored + held_out * mean + rows * BESIDE_PICTURES)


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
    devices: Mapping[str, Accelerator],
    data: facts.Data,
    steps: facts.Steps,
    measured: sizes.Sizes,
) -> tuple[facts.Duration | None, str | None]:
    own = [name for name in devices if name == THIS]
    if len(devices) > 1 and not own:
        return None, ASK
    if steps.total is None or data.tokens_a_row is None:
        return None, "the tokens of a row are not known"
    [name] = own or devices
    device = devices[name]
    spec = order.loaded.spec
    found = speed.training_time(
        speed.measurements(),
        device=device.name,
        cores=device.cores,
        parameters=measured.parameters,
        trained=spec.lora.method,
        compiled=spec.train.torch_compile,
        tokens=steps.total * steps.rows_a_step * data.tokens_a_row,
        tokens_a_pass=spec.train.per_device_train_batch_size * data.tokens_a_row,
    )
    if found is None and len(devices) > 1:
        return None, ASK
    if found is None:
        kind = "accelerator" if device.cores is None else f"CPU of {device.cores} cores"
        return None, f"no measurement for this {kind} ({device.name}) with a model of this size"
    hour = order.price_per_hour
    return facts.Duration(
        accelerator=name,
        shortest=round(found.shortest, 1),
        longest=round(found.longest, 1),
        cost_from=None if hour is None else round(found.shortest / 3600 * hour, 2),
        cost_to=None if hour is None else round(found.longest / 3600 * hour, 2),
        sources=found.sources,
        beyond=found.beyond,
    ), None


def _stages(job: Stages) -> Iterator[tuple[str, str]]:
    for stage in COMMANDS["run"]:
        if stage == "baseline" and not job.spec.eval.baseline:
            yield stage, "off (eval.baseline: false)"
            continue
        # Without a marker it will run; the fingerprint would read all data for nothing.
        marked = job.output.has_marker(stage)
        record = job.output.completed(stage, job.fingerprint(stage)) if marked else None
        if record is not None:
            job.record.add(record)  # the report's fingerprint asks for them
        yield stage, f"complete since {record.started}; will be skipped" if record else "will run"


def _value(loaded: LoadedSpec, path: str) -> Any:
    found: Any = loaded.resolved
    for key in path_of(path):
        found = found[key]
    return found

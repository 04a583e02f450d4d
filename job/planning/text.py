"""A plan as text, within 100 columns, and as JSON."""

import textwrap
from collections.abc import Iterable, Iterator

from job import log, redaction
from job.planning.facts import (
    Data,
    DeviceFit,
    JobTime,
    Plan,
    Reinforcement,
    StageTime,
    Validation,
)

WIDTH = 98
_PARTS = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "attention": "attention",
    "logits": "logits and loss",
    "working": "temporary tensors",
    "context": "runtime (allowance)",
}

Lines = Iterable[tuple[str, str]]


def text(plan: Plan) -> str:
    """The plan, section by section, with names in their own column."""
    sections: dict[str, Lines] = {
        "settings that differ from the defaults": [
            (path, str(value)) for path, value in plan.settings.items()
        ],
        "data": _data(plan),
        "model": _model(plan),
        _memory_title(plan): _memory(plan),
        **(
            {"training time": _time(plan)}
            if plan.job_time is None
            else _job_time(plan.job_time, plan.steps.processes)
        ),
        **({"validation": _validation(plan.validation)} if plan.validation else {}),
        **({"reinforcement": _reinforcement(plan.reinforcement)} if plan.reinforcement else {}),
        "disk": _disk(plan),
        "resources of a pod": [
            (
                pod.name,
                f"{log.size(pod.memory)} memory ({log.size(pod.shared_memory)} of it shared), "
                f"{log.size(pod.scratch)} scratch disk, {log.size(pod.cache)} cache",
            )
            for pod in plan.pods
        ],
        "stages": plan.stages.items() or [("unknown", plan.stages_unknown or "")],
    }
    lines = [f"plan of {plan.name} → {plan.output}"]
    for title, rows in sections.items():
        rows = list(rows)
        width = max((len(name) for name, _ in rows), default=0)
        lines += ["", title]
        for name, value in rows:
            lines += _wrapped(name, value, width)
    return redaction.shown("\n".join(lines))


def as_json(plan: Plan) -> str:
    """The plan as JSON; `facts` documents the keys."""
    return redaction.as_json(plan.to_json(), indent=2)


def _wrapped(name: str, value: str, width: int) -> Iterator[str]:
    room = WIDTH - width - 4
    pieces = [value]
    if len(value) > room:  # only then, because wrapping collapses columns
        pieces = textwrap.wrap(value, room, break_on_hyphens=False, break_long_words=False)
    for number, piece in enumerate(pieces):
        yield f"  {'' if number else name:<{width}}  {piece}".rstrip()


def _data(plan: Plan) -> Iterator[tuple[str, str]]:
    data, steps = plan.data, plan.steps
    # Prep finds leaked and rejected rows only when it reads them all.
    about, train, held_out = "about ", "", ""
    if data.as_prepared:
        about = ""
    elif data.exact:
        about, train, held_out = "", " before leak removal and rejects", " before rejects"
    if data.train_rows is not None:
        one = f"  ({data.sources[0].uri})" if len(data.sources) == 1 else ""
        yield "train rows", f"{about}{data.train_rows:,}{train}{one}"
        for source in data.sources if len(data.sources) > 1 else ():
            yield "", f"{source.rows_an_epoch:,} of {source.rows:,}  ({source.uri})"
        yield (
            "held-out rows",
            f"{about}{data.held_out_rows:,}{held_out}, at most {data.asked} evaluated",
        )
    if data.validation_rows is not None:
        yield "validation rows", f"{about}{data.validation_rows:,}{held_out}"
    if data.sampled:
        yield "sample", _sample(data)
    if data.images_a_row is not None:
        without = f"; {data.rows_without_image} have none" if data.rows_without_image else ""
        yield "images", f"{data.images_a_row:g} per sampled row{without}"
    own = "each row's own; no data.instruction"
    yield "question", own if data.question is None else f"{data.question}  (or a row's own)"
    if data.warning is not None:
        yield "warning", data.warning
    if data.tokens_a_row is not None and data.tokens_an_epoch is not None:
        yield (
            "tokens",
            f"{data.tokens_a_row:,.0f} per row (longest: {data.longest_row:,}), "
            f"about {data.tokens_an_epoch:,} per epoch",
        )
    if data.answers_too_long:
        yield (
            "warning",
            f"{data.answers_too_long:.0%} of the sampled labels are longer than "
            f"eval.generation.max_new_tokens, {data.max_new_tokens:,} (longest: "
            f"{data.longest_answer:,}): no answer can match them; set it to auto",
        )
    if data.unknown is not None:
        yield "unknown", data.unknown
    if steps.processes == 1:
        yield "rows per step", f"{steps.rows_a_step} per process"
    else:
        rows = steps.rows_a_step * steps.processes
        yield "rows per step", f"{rows}: {steps.rows_a_step} of each process"
        yield "processes", f"{steps.processes}, on an accelerator each"
    if steps.total is not None and steps.an_epoch is not None:
        yield (
            "steps",
            f"{steps.total:,} ({steps.epochs:.2f} epochs of {about}{steps.an_epoch:,})",
        )
    elif steps.total is not None:
        yield "steps", f"{steps.total:,}"


def _sample(data: Data) -> str:
    text = f"the first {data.sampled} rows" + (" of all sources" if len(data.sources) > 1 else "")
    if data.refused:
        text += f"; {data.refused} rejected ({data.first_refusal})"
    if data.too_long:
        text += f"; {data.too_long} left out, being longer than train.max_length"
    return text


def _model(plan: Plan) -> Iterator[tuple[str, str]]:
    model = plan.model
    yield "family", f"{model.family}, {model.parameters / 1e6:,.1f} M parameters"
    download = plan.disk.download
    yield "checkpoint", model.uri + (f" ({log.size(download)} to download)" if download else "")
    if model.adapter is not None:
        yield "continues", model.adapter
    for group in model.groups:
        yield f"lora: {group.name}", f"{group.tensors} tensors, {group.trainable:,} trainable"
        for pattern in group.patterns:
            yield "", pattern
    share = model.trainable / model.parameters
    yield "trainable", f"{model.trainable:,} ({share:.2%})"
    if model.served is not None:
        yield "served", model.served
    yield "engine", model.engine
    yield "compiled", model.compiled
    if model.padded is not None:
        yield "batches", f"padded: {model.padded}"


def _memory_title(plan: Plan) -> str:
    memory = plan.memory
    if memory is None:
        return "memory of one device"
    basis = (
        "the heaviest of the sample" if memory.basis == "sample" else "as long as max_length allows"
    )
    if len(memory.fits) > 1:
        return f"memory of one device: a step's heaviest pass ({basis})"
    return (
        f"memory of one device: a pass of {memory.batch_rows} rows ({basis}), "
        f"{memory.batch_tokens:,} tokens"
    )


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    memory = plan.memory
    if memory is None:
        yield "unknown", plan.memory_unknown or ""
        return
    if len(memory.fits) == 1:
        [fit] = memory.fits
        yield "device", f"{fit.title}, {fit.dtype}"
        yield "a step", _passes(fit)
        for part, name in _PARTS.items():
            if fit.parts[part]:
                yield name, f"{log.size(fit.parts[part]):>10}"
        yield "total", f"{log.size(fit.total):>10} of {log.size(fit.memory)}: {_verdict(fit)}"
        if fit.loading:
            yield "while loading", f"{log.size(fit.loading):>10}: weights, before the first step"
        if memory.basis == "sample":
            yield "at max_length", f"{log.size(fit.at_max_length):>10} if every row were that long"
        yield "uncertainty", f"{memory.uncertainty:.0%} of what depends on the batch"
        return
    for fit in memory.fits:
        yield (
            fit.accelerator,
            f"{log.size(fit.total):>10} of {log.size(fit.memory):>10}  "
            f"{_verdict(fit).partition(':')[0]}; {_passes(fit)}",
        )
    yield "", "for a breakdown: --accelerator NAME"


def _passes(fit: DeviceFit) -> str:
    passes = "1 pass" if fit.passes == 1 else f"{fit.passes} passes"
    rows = "1 row" if fit.pass_rows == 1 else f"{fit.pass_rows} rows"
    kept = "recomputed" if fit.gradient_checkpointing else "kept"
    shards = "" if fit.processes is None else f", weights sharded over {fit.processes} processes"
    return f"{passes} of {rows}, activations {kept}{shards}"


def _verdict(fit: DeviceFit) -> str:
    verdict = "fits" if fit.fits else "does not fit"
    return f"{verdict}, barely: within the estimate's uncertainty" if fit.tight else verdict


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    time = plan.time
    if time is None:
        yield "unknown", plan.time_unknown or ""
        return
    low, high = log.duration(time.shortest), log.duration(time.longest)
    span = low if low == high else f"{low} to {high}"
    yield "training only", f"{span} on {_devices(time.accelerator, plan.steps.processes)}"
    if time.cost_from is not None and time.cost_to is not None:
        low, high = f"{time.cost_from:,.2f}", f"{time.cost_to:,.2f}"
        yield "cost", (low if low == high else f"{low} to {high}") + " at the given price"
    for source in time.sources:
        yield "measured", source
    yield (
        "uncertainty",
        (
            "an order of magnitude: no micro-batch of this size was measured"
            if time.beyond
            else "from the slowest to the fastest of the measured micro-batches nearest in size"
        ),
    )


def _job_time(time: JobTime, processes: int) -> dict[str, Lines]:
    lines = [(each.stage, _stage_time(each)) for each in (*time.stages, time.total)]
    lines += [("measured", source) for source in time.sources]
    lines.append(("not counted", "downloads and uploads, and reinforcement if there is any"))
    return {f"time and cost on {_devices(time.accelerator, processes)}": lines}


def _devices(accelerator: str, processes: int) -> str:
    return accelerator if processes == 1 else f"{processes} × {accelerator}"


def _stage_time(time: StageTime) -> str:
    low, high = log.duration(time.shortest), log.duration(time.longest)
    text = f"{low if low == high else f'{low} to {high}'}, ±{time.error:.0%}"
    if time.stage != "total" or time.cost_from is None or time.cost_to is None:
        return text
    low, high = f"{time.cost_from:,.2f}", f"{time.cost_to:,.2f}"
    return f"{text}; {low if low == high else f'{low} to {high}'} at the given price"


def _validation(validation: Validation) -> Iterator[tuple[str, str]]:
    times = "" if validation.times is None else f", {validation.times:,} times"
    yield "rows", f"at most {validation.rows:,}{times}; compared by {validation.metric}"
    if validation.share is not None:
        each = ""
        if validation.seconds is not None:
            low, high = (log.duration(seconds) for seconds in validation.seconds)
            each = f": {low if low == high else f'{low} to {high}'} each"
        yield "loss", f"adds about {validation.share:.0%} to the training time{each}"
    if validation.answers:
        yield "answers", "are generated too, which takes longer; the log of a run tells the share"


def _reinforcement(stage: Reinforcement) -> Iterator[tuple[str, str]]:
    yield (
        "answers",
        f"{stage.steps:,} steps of {stage.rows_a_step:,} rows with {stage.answers_a_step:,} "
        f"answers: {stage.answers:,} answers to generate",
    )
    if stage.tokens is not None:
        yield "tokens", f"at most {stage.tokens:,}, prompts included"
    extra = [f"logits of a pass {log.size(stage.logits_bytes)}"]
    if stage.cache_bytes is not None:
        extra.insert(0, f"keys and values of the answers {log.size(stage.cache_bytes)}")
    if stage.copied_bytes:
        extra.append(f"copies of the adapter {log.size(stage.copied_bytes)}")
    yield "memory", f"beside weights, optimizer and activations at most: {', '.join(extra)}"
    if len(stage.fits) == 1:
        [fit] = stage.fits
        verdict = "fits" if fit.fits else "does not fit"
        yield "a pass", f"{log.size(fit.total)} of {log.size(fit.memory)}: {verdict}"
    elif stage.fits:
        lacking = [fit.accelerator for fit in stage.fits if not fit.fits]
        yield "a pass", f"does not fit {', '.join(lacking)}" if lacking else "fits all of these"
    if stage.shortest is None or stage.longest is None or stage.generating is None:
        yield "time", "unknown: no similar job was measured, or for several accelerators"
        return
    low, high = log.duration(stage.shortest), log.duration(stage.longest)
    yield (
        "time",
        f"{low if low == high else f'{low} to {high}'}, up to {stage.generating:.0%} of it in "
        "generation; by measurements of other stages, none of this one",
    )


def _disk(plan: Plan) -> Iterator[tuple[str, str]]:
    disk = plan.disk
    if disk.download:
        yield "download", f"{log.size(disk.download)}, cached"
    if disk.prepared is not None:
        yield "prepared rows", f"about {log.size(disk.prepared)}"
    yield "checkpoints", f"at most {log.size(disk.checkpoints)} at one time"
    yield "adapter/" if plan.model.groups else "weights/", log.size(disk.adapter)
    if plan.reinforcement is not None:
        yield "reinforced/", log.size(disk.adapter)
    if disk.merged:
        yield "merged/", log.size(disk.merged)

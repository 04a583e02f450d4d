"""`job plan`: what a run would do, from headers and lists alone: no weights, no training."""

import math
import re
from collections.abc import Sequence
from typing import Any

from job import log, redaction
from job.needs import needs
from job.pipeline import COMMANDS, Pipeline
from job.prep import mixture, sources
from job.sizes import BYTES, WEIGHTS, adapter_parameters, measure
from job.spec.keys import path_of
from job.spec.load import LoadedSpec


def plan(loaded: LoadedSpec) -> str:
    """The plan as text: settings, data, model, stages.

    Raises InputError where an input is missing.
    """
    pipeline = Pipeline(loaded, "plan")
    sections = {
        "settings that differ from the defaults": _settings(loaded),
        "data": _data(pipeline),
        "model": _model(pipeline),
        "a pod asks a cluster for": _pods(pipeline),
        "stages": _stages(pipeline),
    }
    lines = [f"plan of {loaded.spec.name} → {loaded.spec.output.uri}"]
    for title, rows in sections.items():
        width = max((len(name) for name, _ in rows), default=0)
        lines += ["", title]
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    return redaction.redact("\n".join(lines))


def _settings(loaded: LoadedSpec) -> list[tuple[str, str]]:
    def value(path: str) -> Any:
        found: Any = loaded.resolved
        for key in path_of(path):
            found = found[key]
        return found

    return [(path, str(value(path))) for path in loaded.changed]


def _data(pipeline: Pipeline) -> list[tuple[str, str]]:
    spec = pipeline.spec
    places = spec.data.sources()
    rows = [sources.count(found, places[place]) for place, found in pipeline.sources.items()]
    if pipeline.eval_source is not None:
        held_out = rows.pop()
    else:
        held_out = round(sum(rows) * spec.data.eval_fraction)
        rows = [count - round(count * spec.data.eval_fraction) for count in rows]
    weights = [source.weight for source in spec.data.train]
    mixed = mixture.counts(rows, weights, spec.data.stopping_strategy)
    train_rows = sum(mixed)
    a_step = pipeline.rows_a_step
    an_epoch = math.ceil(train_rows / a_step)
    steps = spec.train.max_steps
    if steps < 0:
        steps = math.ceil(an_epoch * spec.train.num_train_epochs)
    about = "" if pipeline.eval_source is not None else "about "
    uris = [source.uri for source in spec.data.train]
    shares = [("", f"{n:,} of {m:,}  ({uri})") for n, m, uri in zip(mixed, rows, uris, strict=True)]
    return [
        ("train rows", f"{about}{train_rows:,}" + (f"  ({uris[0]})" if len(uris) == 1 else "")),
        *(shares if len(uris) > 1 else ()),
        (
            "held-out rows",
            f"{about}{held_out:,}, of which {spec.eval.max_samples} at most are asked",
        ),
        (
            "rows a step",
            f"{a_step} for each process: {spec.train.per_device_train_batch_size} a forward pass × "
            f"{spec.train.gradient_accumulation_steps}",
        ),
        ("steps", f"{steps:,} of {an_epoch:,} an epoch ({steps / max(1, an_epoch):.2f} epochs)"),
    ]


def _model(pipeline: Pipeline) -> list[tuple[str, str]]:
    spec = pipeline.spec
    skeleton = pipeline.family.skeleton()
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    rows = [
        ("family", f"{pipeline.family.name}, {total / 1e6:,.1f} M parameters"),
        ("checkpoint", f"{pipeline.model_input.uri} ({log.size(pipeline.model_input.size_bytes)})"),
        ("device", f"{pipeline.accelerator.kind}: {pipeline.accelerator.name}"),
        ("dtype", str(pipeline.engine.dtype).removeprefix("torch.")),
    ]
    if spec.train.padding_free and not pipeline.family.packs:
        rows.append(("batches", "padded: the family has no padding-free step"))
    if spec.lora.method == "lora":
        targets = pipeline.family.lora_targets(skeleton, spec.lora)
        counts = [adapter_parameters(skeleton, group, spec.lora.r) for group in targets.groups]
        trainable = sum(counts)
        for group, count in zip(targets.groups, counts, strict=True):
            rows.append((f"lora: {group.name}", f"{len(group)} tensors, {count:,} trainable"))
            rows += [("", line) for line in patterns((*group.modules, *group.parameters))]
        rows += [
            ("served", str(pipeline.family.adapter_serving(spec.lora))),
            ("trainable", f"{trainable:,} ({trainable / total:.2%})"),
            ("adapter/", log.size(trainable * WEIGHTS)),
        ]
    if spec.export.merged.enabled:
        dtype = spec.export.merged.dtype
        rows.append(("merged/", f"{log.size(total * BYTES[dtype])} in {dtype}"))
    return rows


def _pods(pipeline: Pipeline) -> list[tuple[str, str]]:
    sizes = measure(pipeline.spec)
    rows = []
    for name, gpus in (("with a GPU", 1), ("on CPUs", 0)):
        found = needs(pipeline.spec, sizes, gpus=gpus)
        amounts = {
            "memory": found.memory,
            "of it shared": found.shared_memory,
            "scratch disk": found.ephemeral,
            "cache": found.cache,
        }
        rows.append((name, ", ".join(f"{log.size(n)} {what}" for what, n in amounts.items())))
    return rows


def patterns(names: Sequence[str]) -> list[str]:
    """Names that differ in one number as one line: `layers.0-3.self_attn.q_proj`."""
    found: dict[str, list[int]] = {}
    for name in names:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        found.setdefault(pattern, []).extend(map(int, numbers[:1]))
    return [pattern.replace("{}", _ranges(numbers), 1) for pattern, numbers in found.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _stages(pipeline: Pipeline) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for stage in COMMANDS["run"]:
        if stage == "baseline" and not pipeline.spec.eval.baseline:
            state = "off (eval.baseline: false)"
        else:
            record = pipeline.output.completed(stage, pipeline.fingerprint(stage))
            if record is not None:
                pipeline.record.add(record)  # the report's fingerprint asks for them
            state = f"complete since {record.started}; will be skipped" if record else "will run"
        rows.append((stage, state))
    return rows

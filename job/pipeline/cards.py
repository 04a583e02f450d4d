"""Writes the model cards of a run: `README.md` in `adapter/` and `merged/`.

A stage of its own, after all that it describes: the adapter is stored before it is evaluated.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from job import families, storage
from job.errors import JobError
from job.evaluation.report.headline import headline
from job.export import model_card
from job.families import model_source
from job.pipeline import pushing
from job.pipeline.context import RunContext
from job.pipeline.fingerprints import UNTRAINED_KEYS
from job.spec.types import JobSpec
from job.storage import retry


def write(run: RunContext, directory: Path) -> dict[str, Any]:
    """Writes a card into each folder of the export; returns which, as the stage's summary."""
    parts: list[model_card.Part] = ["adapter"] if run.spec.lora.method == "lora" else []
    if "export" in run.record.stages and run.spec.export.merged.enabled:
        parts.append("merged")
    inputs = _inputs(run)
    for part in parts:
        folder = directory / (f"{run.trained_folder}{part}" if part == "adapter" else part)
        folder.mkdir(parents=True)
        repository = run.spec.export.hub_model_id if _is_pushed(run.spec, part) else None
        text = model_card.render(replace(inputs, repository=repository), part)
        (folder / model_card.CARD).write_text(text, encoding="utf-8")
    return {
        "cards": [
            str(path.relative_to(directory)) for path in sorted(directory.rglob(model_card.CARD))
        ]
    }


def _inputs(run: RunContext) -> model_card.CardInputs:
    spec, record, model = run.spec, run.record, run.inputs.model
    family, _ = families.resolve(spec.model)
    headers = model_source.fetch_headers(model, run.cache_dir, run.cache_limit)
    config = families.read_checkpoint(model.uri, headers).config
    return model_card.CardInputs(
        spec=spec,
        settings=_settings(run),
        family=family,
        base=model_card.Base(
            uri=model.uri,
            digest=model.digest,
            layout=family.own_layout(config),
            license=_license(model.uri),
        ),
        sources={name: each for name, each in record.inputs.items() if name != "model"},
        stages={name: stage.summary for name, stage in record.stages.items()},
        metrics=_metrics(run),
        versions=record.versions,
    )


def _is_pushed(spec: JobSpec, part: model_card.Part) -> bool:
    return spec.export.push_to_hub and pushing.content(spec) in (part, "all")


def _settings(run: RunContext) -> dict[str, Any]:
    """The settings that affect the weights, secrets as names."""
    resolved = run.loaded.resolved
    lora = {"method": "full"} if run.spec.lora.method == "full" else resolved["lora"]
    train = {k: v for k, v in resolved["train"].items() if k not in UNTRAINED_KEYS}
    sections = {"lora": lora, "train": train}
    if run.spec.reinforce is not None:
        sections["reinforce"] = resolved["reinforce"]
    return {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in sections.items()
    }


def _metrics(run: RunContext) -> tuple[model_card.Metric, ...]:
    stages = run.record.stages
    if "eval" not in stages:
        return ()
    after = stages["eval"].summary["metrics"]
    before = stages["baseline"].summary["metrics"] if "baseline" in stages else None
    return tuple(
        model_card.Metric(
            key=each.key,
            name=each.name,
            description=each.description,
            before=each.before,
            after=each.after,
            value=after[each.key],
            verdict=each.verdict,
        )
        for each in headline(before, after)
    )


def _license(uri: str) -> dict[str, str]:
    """The license that the base's own card states; empty if it has no card that can be read."""
    try:
        with retry.at_most(1):
            card = storage.join(model_source.location(uri), model_card.CARD)
            return model_card.license_of(storage.read_text(card))
    except (JobError, UnicodeDecodeError):
        return {}

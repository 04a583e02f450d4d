"""The model card of an export: `README.md` with the hub's metadata, for `adapter/` and `merged/`.

It states what the run measured and nothing else: no license that the base does not state, no
language, no path or bucket of the user.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from job import storage
from job.export import markdown
from job.export.loading import Commands, commands
from job.families.base import Family, Layout
from job.redaction import redact
from job.spec.answer_kinds import RIGHT, Answer
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
Part = Literal["adapter", "merged"]

FEW_ROWS = 100
"""Test rows below which the card calls its figures rough."""
POOR = 0.5
"""The share of right answers below which the card says so."""
_COMPARED: Mapping[Answer, str] = {
    "text": "as text, with white space collapsed",
    "latex": "as LaTeX; normalized formulas are equal if they render the same",
    "json": "as JSON values, and field by field",
    "label": "as one of the classes of the data",
}
_PUBLIC = ("hf://", "builtin://")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of the table: a metric on the test rows, as text before and after training."""

    key: str
    name: str
    description: str
    before: str | None
    after: str
    value: float
    """After training."""
    verdict: Literal["better", "worse", "equal"] | None
    """None without a baseline."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that training started from."""

    uri: str
    """With its revision, if the spec names one."""
    digest: str
    layout: Layout | None
    """Its layout, if those of the family differ."""
    license: Mapping[str, str]
    """The license keys of its own model card; empty if it has none."""


@dataclass(frozen=True, kw_only=True)
class CardInputs:
    """What a run knows about its export."""

    spec: JobSpec
    settings: Mapping[str, Any]
    """The keys of `lora`, `train` and `reinforce` that affect the weights; secrets as names."""
    family: type[Family]
    base: Base
    sources: Mapping[str, Mapping[str, str]]
    """URI and digest of each source of data, by name."""
    stages: Mapping[str, Mapping[str, Any]]
    """The summaries of the complete stages, by name."""
    metrics: Sequence[Metric]
    """Empty without an evaluation."""
    versions: Mapping[str, str]
    repository: str | None = None
    """Where the export is pushed to, `org/name`, if it is."""


def render(inputs: CardInputs, part: Part) -> str:
    """The card of one folder."""
    page = markdown.environment(Path(__file__).parent).get_template("model_card.md.jinja")
    metadata = _metadata(inputs, part)
    validation = inputs.stages["train"].get("validation")
    evaluation = inputs.stages.get("eval")
    text = page.render(
        part=part,
        spec=inputs.spec,
        base=_public(inputs.base.uri),
        digest=inputs.base.digest,
        license=metadata.get("license"),
        sources={name: _source(each) for name, each in inputs.sources.items()},
        rows=inputs.stages["prep"]["rows"],
        train=inputs.stages["train"],
        reinforced=inputs.stages.get("reinforce"),
        validation=validation if isinstance(validation, dict) else None,
        evaluation=evaluation,
        compared=_COMPARED[inputs.spec.eval.answer],
        metrics=inputs.metrics,
        limits=_limits(inputs),
        thoughts=_thoughts(inputs),
        settings=yaml.safe_dump(dict(inputs.settings), sort_keys=False, allow_unicode=True),
        export=_proof(inputs, part),
        load=_commands(inputs, part),
        versions=inputs.versions,
    )
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return redact(f"---\n{front}---\n\n{text}")


def license_of(text: str) -> dict[str, str]:
    """The license keys in the metadata of a model card; empty if there are none."""
    head, _, rest = text.partition("\n")
    front, end, _ = rest.partition("\n---")
    if head.strip() != "---" or not end:
        return {}
    try:
        metadata = yaml.safe_load(front)
    except yaml.YAMLError:
        return {}
    names = ("license", "license_name", "license_link")
    known = metadata if isinstance(metadata, dict) else {}
    return {name: known[name] for name in names if isinstance(known.get(name), str)}


def _metadata(inputs: CardInputs, part: Part) -> dict[str, Any]:
    """The hub's metadata."""
    from huggingface_hub import ModelCardData

    adapter = part == "adapter"
    base = _hub_id(inputs.base.uri)
    images = inputs.family.reads_images and not inputs.spec.data.text_only
    method = "lora" if inputs.spec.lora.method == "lora" else "full-fine-tuning"
    datasets = [_hub_id(each["uri"], "datasets/") for each in inputs.sources.values()]
    more = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    results = [_result(inputs, metric) for metric in inputs.metrics]
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text" if images else "text-generation",
        tags=["finetune-job", method],
        datasets=sorted({name for name in datasets if name}) or None,
        metrics=[metric.key for metric in inputs.metrics if metric.key != "loss"] or None,
        model_name=inputs.spec.name if results else None,
        eval_results=results or None,
        ignore_metadata_errors=False,
        **inputs.base.license,
        **more,
    )
    metadata: dict[str, Any] = yaml.safe_load(data.to_yaml())
    return metadata


def _result(inputs: CardInputs, metric: Metric) -> "EvalResult":
    from huggingface_hub import EvalResult

    images = inputs.family.reads_images and not inputs.spec.data.text_only
    rows = inputs.stages["eval"]["rows"]
    return EvalResult(
        task_type="image-text-to-text" if images else "text-generation",
        dataset_type="held-out",
        dataset_name=f"{rows} held-out rows of the training job",
        metric_type=metric.key,
        metric_name=metric.name,
        metric_value=metric.value,
    )


def _limits(inputs: CardInputs) -> list[markdown.Markdown | str]:
    """What a reader should know before using the model."""
    if not inputs.metrics:
        return ["It has not been evaluated."]
    limits: list[markdown.Markdown | str] = []
    compared = [metric for metric in inputs.metrics if metric.verdict is not None]
    behind = [metric.name for metric in compared if metric.verdict != "better"]
    if not compared:
        limits.append("It has not been compared with the base.")
    elif len(behind) == len(compared):
        limits.append(
            markdown.Markdown("**It is not better than the base** in any metric of the table.")
        )
    elif behind:
        limits.append(f"It is not better than the base in: {'; '.join(behind)}.")
    right = {metric.key: metric for metric in inputs.metrics if metric.key in RIGHT}
    telling = next((right[key] for key in RIGHT if key in right), None)
    if telling is not None and telling.value < POOR:
        limits.append(
            f"Fewer than half of its answers are right ({telling.name}: {telling.after})."
        )
    evaluation = inputs.stages["eval"]
    if evaluation["rows"] < FEW_ROWS:
        limits.append(f"With {evaluation['rows']} test rows, the figures are rough.")
    if evaluation["cut_short"]:
        limits.append(
            f"{evaluation['cut_short']} of {evaluation['answers']} answers reached the limit of "
            f"{evaluation['max_new_tokens']} tokens and were cut."
        )
    limits.append(
        "Nothing was measured but the table: not other data, not what else the base could do, not "
        "the safety of its answers."
    )
    return limits


def _thoughts(inputs: CardInputs) -> Literal["none", "some", "all"]:
    """Which of the trained answers had thoughts before them. Reinforced ones have none."""
    answers = inputs.stages["prep"].get("answers", {})
    if not answers.get("with_thoughts") or not inputs.stages["train"]["steps"]:
        return "none"
    without = answers["with_thoughts"] < answers["trained"] or "reinforce" in inputs.stages
    return "some" if without else "all"


def _proof(inputs: CardInputs, part: Part) -> Mapping[str, Any] | None:
    """The measurements that verify this part; None if it was not verified."""
    export = inputs.stages.get("export", {})
    key = "adapter_reloaded" if part == "adapter" else "merged_reloaded"
    return export if export.get(key) is not None else None


def _commands(inputs: CardInputs, part: Part) -> Commands:
    return commands(
        inputs.spec,
        inputs.family,
        part=part,
        base=_hub_id(inputs.base.uri),
        revision=_revision(inputs.base.uri),
        base_layout=inputs.base.layout,
        repository=inputs.repository,
    )


def _source(source: Mapping[str, str]) -> dict[str, str]:
    return {"uri": _public(source["uri"]), "digest": source["digest"]}


def _public(uri: str) -> str:
    """A URI as strangers may see it: in full on the hub, otherwise the last name only."""
    uri = redact(uri)
    return uri if uri.startswith(_PUBLIC) else storage.name(uri)


def _hub_id(uri: str, kind: str = "") -> str | None:
    """The repository of a hub URI, `org/name`; None for others, and for another kind."""
    path = uri.removeprefix(f"hf://{kind}")
    parts = redact(path).split("/")
    if path == uri or len(parts) < 2 or parts[0] in ("datasets", "spaces"):
        return None
    return f"{parts[0]}/{parts[1].partition('@')[0]}"


def _revision(uri: str) -> str | None:
    return redact(uri).partition("@")[2].partition("/")[0] or None

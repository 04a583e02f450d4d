"""The model cards: the hub's metadata, what was measured, what can load them, and no secrets."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from job.export import markdown, model_card
from job.export.model_card import Base, CardInputs, Metric, Part
from job.families import FAMILIES
from job.redaction import add_secrets_of
from job.spec.load import load_spec
from tests.jobs import ROOT

LATEX = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
TRAIN = {
    "steps": 60,
    "rows_a_step": 8,
    "epochs": 1.5,
    "tokens": 1000,
    "trainable_parameters": 10,
    "total_parameters": 100,
    "optim": "adamw_torch",
    "first_loss": 2.0,
    "final_loss": 0.5,
    "dropped_rows": 0,
}
COMPARED = {"relative_rms": 0.0002, "same_answers": 4, "probes": 4}
EXPORT = {
    "tensors": 128,
    "tensors_checked": 128,
    "adapted_tensors": 40,
    "changed_tensors": 40,
    "adapter_reloaded": COMPARED,
    "merged_reloaded": COMPARED,
    "merged_served": None,
}
EVAL = {"rows": 256, "answers": 256, "cut_short": 0, "max_new_tokens": 64}
STAGES: dict[str, dict[str, Any]] = {
    "prep": {"rows": {"train": 1000, "eval": 256, "rejected": 3, "leaked": 2}},
    "train": TRAIN,
    "eval": EVAL,
    "export": EXPORT,
}
REINFORCED = {"steps": 1, "answers_a_step": 8, "rows_a_step": 2, "rewards": ["length"]}
HUB = "hf://org/base@abc123"


def metric(key: str, before: float | None, after: float, verdict: Any) -> Metric:
    text = None if before is None else f"{before:g}"
    return Metric(
        key=key, name=key.upper(), description="d", before=text, after=f"{after:g}", value=after,
        verdict=verdict,
    )  # fmt: skip


GOOD = (metric("cer", 0.68, 0.2, "better"), metric("exact_match", 0.016, 0.6, "better"))


def inputs(
    *sets: str,
    family: str = "vlm",
    base: str = HUB,
    metrics: tuple[Metric, ...] = GOOD,
    stages: dict[str, dict[str, Any]] = STAGES,
    sources: dict[str, str] | None = None,
    license: dict[str, str] | None = None,
    repository: str | None = None,
) -> CardInputs:
    loaded = load_spec(LATEX, "spec", sets, {})
    [kind] = [each for each in FAMILIES if each.name == family]
    found = sources or {"train": "hf://datasets/org/rows", "eval": "s3://secret-bucket/eval.jsonl"}
    return CardInputs(
        spec=loaded.spec,
        settings={"lora": loaded.resolved["lora"], "train": loaded.resolved["train"]},
        family=kind,
        base=Base(uri=base, digest="d1", license=license or {},
                  layout="vllm" if family == "ernie45_vl" else None),
        sources={name: {"uri": uri, "digest": f"of {name}"} for name, uri in found.items()},
        stages=copy.deepcopy(stages),
        metrics=metrics,
        versions={"job": "0.1.0", "torch": "2.14.1"},
        repository=repository,
    )  # fmt: skip


def card(part: Part = "adapter", **changes: Any) -> str:
    return model_card.render(inputs(*changes.pop("sets", ()), **changes), part)


def test_the_metadata_is_the_hubs_and_only_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card(license={"license": "mit"}))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name) == ("org/base", "peft")
    assert (data.license, data.pipeline_tag) == ("mit", "image-text-to-text")
    assert data.datasets == ["org/rows"]
    assert data.language is None
    assert data.metrics == ["cer", "exact_match"]
    assert [each.metric_value for each in data.eval_results or ()] == [0.2, 0.6]

    local = card("merged", base="/home/me/models/base", sources={"train": "/home/me/rows.jsonl"})
    front = yaml.safe_load(local.split("---")[1])
    assert front["library_name"] == "transformers"
    assert not {"base_model", "base_model_relation", "license", "datasets"} & front.keys()
    assert "/home/me" not in local
    assert "`rows.jsonl`" in local


def test_a_card_shows_neither_secrets_nor_where_private_data_is() -> None:
    uri = "https://user:pa55word-of-me@host.example/rows.jsonl?sig=0123456789abcdef0123"
    add_secrets_of(uri)
    text = card(sources={"train": uri, "eval": "s3://secret-bucket/deep/eval.jsonl"})
    assert "`eval.jsonl`" in text
    for hidden in ("pa55word", "0123456789abcdef", "secret-bucket", "host.example"):
        assert hidden not in text


def test_values_are_shown_and_never_become_markup() -> None:
    hostile = "x | y ``` <script> [a](b) *b*\n# title"
    text = card(sets=[f"data.instruction={json.dumps(hostile)}"])
    assert f"````\n{hostile}\n````" in text
    assert markdown.escape("a|b *c* [d](e) <f>\n# g") == r"a\|b \*c\* \[d\](e) \<f\> \# g"
    assert markdown.code("a`b|c") == "``a`b\\|c``"
    assert markdown.block("```\nx").startswith("````\n")


def test_the_table_and_the_limits_say_what_the_figures_say() -> None:
    text = card()
    assert "| CER (d) | 0.68 | 0.2 |" in text
    assert "256 held-out rows" in text
    assert "not better" not in text
    worse = (metric("cer", 0.2, 0.3, "worse"), metric("exact_match", 0.1, 0.1, "equal"))
    text = card(metrics=worse, stages={**STAGES, "eval": {**EVAL, "rows": 6, "cut_short": 5}})
    assert "**It is not better than the base** in any metric" in text
    assert "Fewer than half of its answers are right" in text
    assert "With 6 test rows, the figures are rough" in text
    assert "5 of 256 answers reached the limit of 64 tokens" in text
    assert "not better than the base in: EXACT" in card(metrics=(GOOD[0], worse[1]))
    alone = card(metrics=(metric("cer", None, 0.2, None),))
    assert "| CER (d) | 0.2 |" in alone
    assert "It has not been compared with the base" in alone


@pytest.mark.parametrize(
    ("with_thoughts", "more", "said"),
    [
        (0, {}, 'send `"chat_template_kwargs": {"enable_thinking": false}`'),
        (1300, {}, 'send `"chat_template_kwargs": {"enable_thinking": true}`'),
        (7, {}, "Some answers were trained with thoughts"),
        (1300, {"reinforce": REINFORCED}, "Some answers were trained with"),
        (1300, {"train": {**TRAIN, "steps": 0}}, "after an empty thinking block; send"),
    ],
)
def test_a_card_says_whether_the_trained_model_thinks(
    with_thoughts: int, more: dict[str, Any], said: str
) -> None:
    prep = {**STAGES["prep"], "answers": {"trained": 1300, "with_thoughts": with_thoughts}}
    text = card(stages={**STAGES, "prep": prep, **more})
    assert said in text
    assert ("generated without thoughts" in text) == ("empty thinking block; send" not in text)


def test_a_run_without_evaluation_or_export_says_so() -> None:
    stages = {name: STAGES[name] for name in ("prep", "train")}
    text = card(metrics=(), stages=stages)
    assert "It has not been evaluated" in text
    assert "These files were not compared with the trained model" in text
    assert "model-index" not in text


def test_the_step_that_validation_chose_is_named_with_its_metric() -> None:
    validation = {
        "metric": "eval_cer", "best_step": 40, "best": 0.21, "last_step": 60, "last": 0.34,
        "exported_step": 40, "stopped_early": True, "validations": 3, "rows": 30,
    }  # fmt: skip
    text = card(stages={**STAGES, "train": {**TRAIN, "validation": validation}})
    assert "The weights are those of step 40" in text
    assert "`eval_cer` 0.21, against 0.34 at step 60, the last" in text
    assert "stopped early" in text
    reinforced = {
        "steps": 6, "answers_a_step": 8, "rows_a_step": 2, "rewards": {"exact_match": {}},
        "validation": {"exported_step": 3},
    }  # fmt: skip
    train = {**TRAIN, "validation": validation}
    then = card(stages={**STAGES, "train": train, "reinforce": reinforced})
    assert "Reinforcement started from the weights of step 40" in then
    assert "The weights are those of step 3 of these" in then
    assert "The weights are those of step 40" not in then
    last = {**validation, "best_step": 60, "best": 0.2, "last": 0.2, "exported_step": 60}
    text = card(stages={**STAGES, "train": {**TRAIN, "validation": last}})
    assert (
        "3 validations on 30 rows, the last, after step 60, was the best:\n`eval_cer` 0.2." in text
    )
    once = card(stages={**STAGES, "train": {**TRAIN, "validation": {**last, "validations": 1}}})
    assert "the only one that was validated, on 30 rows: `eval_cer` 0.2." in once
    assert "validations" not in card(stages={**STAGES, "train": {**TRAIN, "validation": None}})


@pytest.mark.parametrize("family", ["vlm", "llm"])
def test_commands_load_each_part_of_a_family_whose_layouts_are_the_same(family: str) -> None:
    model = "AutoModelForImageTextToText" if family == "vlm" else "AutoModelForCausalLM"
    adapter = card(family=family)
    assert f'{model}.from_pretrained(base, revision="abc123", dtype="auto")' in adapter
    assert 'base = "org/base"' in adapter
    merged = card("merged", family=family, repository="me/tuned")
    assert f'{model}.from_pretrained("me/tuned", dtype="auto")' in merged
    assert "vllm serve me/tuned --dtype float16" in merged


def test_a_layout_that_something_cannot_read_is_told() -> None:
    published = card("merged", family="ernie45_vl")
    assert "which the classes of Transformers do not read" in published
    assert "vllm serve merged --dtype float16 --trust-remote-code" in published
    other = card("merged", family="ernie45_vl", sets=["export.merged.layout=transformers"])
    assert "which vLLM does not read" in other
    assert "from_pretrained" in other
    adapter = card(family="ernie45_vl")
    assert "vLLM cannot serve this adapter" in adapter
    assert (
        "in its published layout, which this run read, the classes above cannot load it" in adapter
    )
    attention = ["lora.finetune_vision_layers=false", "lora.finetune_mlp_modules=false"]
    served = card(family="ernie45_vl", sets=attention)
    assert "--lora-modules latex=adapter-vllm --lora-target-modules qkv_proj o_proj" in served


def test_the_adapter_beside_merged_weights_is_loaded_from_its_folder() -> None:
    sets = ["export.push_to_hub=true", "export.hub_model_id=me/tuned", "export.hub_content=all"]
    text = card(sets=sets, repository="me/tuned")
    assert 'PeftModel.from_pretrained(model, "me/tuned", subfolder="adapter")' in text


def test_a_training_on_a_4_bit_base_says_so_and_how_far_it_was() -> None:
    away = {"relative_rms": 0.095, "same_top1": 0.951, "same_answers": 0, "probes": 0}
    stages = {**STAGES, "export": {**EXPORT, "in_four_bit": away}}
    for part in ("adapter", "merged"):
        text = card(part, stages=stages, sets=("model.load_in_4bit=true",))
        assert "trained on a 4-bit base (QLoRA, nf4)" in text
    assert "differ by 0.095, and 95.1 % of its most likely tokens are the same" in text
    assert "0 greedy answers" not in text
    assert "4-bit" not in card("merged")


def test_a_full_fine_tuning_is_called_one() -> None:
    full = inputs()
    spec = replace(full.spec, lora=replace(full.spec.lora, method="full"))
    text = model_card.render(replace(full, spec=spec), "merged")
    assert "fine-tuned in all weights" in text
    assert "full-fine-tuning" in text
    assert "adapted tensors differ" not in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\nx", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("# no metadata\nlicense: mit", {}),
        ("---\nlicense: [a\n---\n", {}),
        ("---\nlicense: mit", {}),
        ("---\n- a\n---\n", {}),
    ],
)
def test_a_license_is_read_from_metadata_alone(text: str, found: dict[str, str]) -> None:
    assert model_card.license_of(text) == found

"""The identity of a training, and what checkpoints store of it."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from job import __version__
from job.artifacts.records import StageRecord
from job.pipeline.fingerprints import (
    COMPUTING_KEYS,
    SELECTING_KEYS,
    UNTRAINED_KEYS,
    Stage,
    StageInputs,
)
from job.spec.load import load_spec
from job.spec.types import JobSpec, TrainSpec
from job.storage.digests import fingerprint
from job.train.identity import Identity, changes
from job.train.schedule import LENGTH_KEYS


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


def identity(spec: JobSpec, **train: Any) -> Identity:
    return StageInputs(replace(spec, train=replace(spec.train, **train)), 1).checkpoint_identity()


def another(value: Any) -> Any:
    return not value if isinstance(value, bool) else "other" if value is None else value * 2 or 7


def test_every_key_that_decides_the_weights_is_a_part_and_its_change_is_named(
    spec: JobSpec,
) -> None:
    whole = identity(spec)
    for key in (field.name for field in fields(TrainSpec)):
        changed = identity(spec, **{key: another(getattr(spec.train, key))})
        said = changes(whole.to_json(), changed.to_json())
        same = UNTRAINED_KEYS + LENGTH_KEYS["train"] + SELECTING_KEYS
        how = ("group_by_length", "gradient_checkpointing", "torch_compile", "cuda_graphs")
        if key in same or key in how:
            assert changed.fingerprint == whole.fingerprint, key
        elif key == "metric_for_best_model":
            assert said.startswith("the validation's metric was"), key
        elif key in COMPUTING_KEYS:
            assert said.startswith("train.rows_a_step was"), key
        else:
            assert changed.fingerprint != whole.fingerprint, key
            assert said.startswith(f"train.{key} "), key


def test_fewer_processes_are_told_how_to_resume(spec: JobSpec) -> None:
    """The rows of a step are no key of the spec."""
    eight, four = (StageInputs(spec, count).checkpoint_identity() for count in (8, 4))
    said = changes(eight.to_json(), four.to_json())
    assert said.startswith("train.rows_a_step was 256 and is 128 (per_device_train_batch_size × ")
    assert said.endswith("to resume, keep the product)")


def test_the_metric_by_which_reinforcement_keeps_a_step_is_a_part() -> None:
    path = "specs/latex-grpo.yaml"

    def found(*settings: str) -> Identity:
        spec = load_spec(Path(path).read_text(), path, settings, environ={}).spec
        done = {
            stage: StageRecord(
                name=stage, fingerprint=stage, started="", seconds=0, files=(), summary={}
            )
            for stage in ("prep", "train")
        }
        return StageInputs(spec, 1).reinforcement_identity(done)

    whole = found()
    by_loss = found("reinforce.metric_for_best_model=eval_loss")
    assert "metric was" in changes(whole.to_json(), by_loss.to_json())
    for same in ("eval_exact_match", "null"):  # the default is the first metric
        first = found(f"reinforce.metric_for_best_model={same}")
        assert first.fingerprint == whole.fingerprint, same
    assert found("reinforce.eval_steps=7").fingerprint == whole.fingerprint


def test_data_model_and_adapter_are_parts(spec: JobSpec) -> None:
    whole = identity(spec)
    for section, key, value in (
        ("lora", "r", 5),
        ("model", "dtype", "bfloat16"),
        ("data", "instruction", "Read."),
    ):
        changed = replace(spec, **{section: replace(getattr(spec, section), **{key: value})})
        said = changes(whole.to_json(), identity(changed).to_json())
        assert f"{section}.{key} " in said


def test_what_is_stored_holds_no_secret_and_long_values_are_not_repeated(spec: JobSpec) -> None:
    secret = "https://user:hunter2@host/model"
    parts = {"model.model_name_or_path": secret, "data.instruction": "x" * 500}
    stored = Identity(parts=parts).to_json()
    assert "hunter2" not in str(stored)
    assert changes(stored, {**stored, "data.instruction": "y" * 500}) == "data.instruction changed"
    assert changes(None, stored) == "its manifest does not say what has changed"
    assert asdict(Identity(parts=parts)) == {"parts": parts}


def test_a_validation_split_changes_what_is_prepared_and_trained_not_the_baseline(
    spec: JobSpec, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\na,b\n")
    whole = given(spec)
    for validation in (
        {"validation": replace(spec.data.train[0], uri=str(rows))},
        {"validation_fraction": 0.1},
    ):
        changed = given(replace(spec, data=replace(spec.data, **validation)))
        same = {stage for stage, digest in changed.items() if digest == whole[stage]}
        assert same == {"baseline"}
    samples = replace(spec, eval=replace(spec.eval, validation_samples=7))
    trained = {"train", "eval", "export", "report"}
    assert {stage for stage in whole if given(samples)[stage] != whole[stage]} == trained


def test_a_spec_that_leaves_it_to_the_job_shares_results_with_one_that_names_the_former_default(
    spec: JobSpec,
) -> None:
    def training(**train: Any) -> str:
        changed = replace(spec, train=replace(spec.train, **train))
        return StageInputs(changed, 1).fingerprint("train", {})

    for key, former in (("gradient_checkpointing", True), ("torch_compile", False)):
        assert training(**{key: "auto"}) == training(**{key: former})
        assert training(**{key: "auto"}) != training(**{key: not former})


FORMER_LORA = {
    "method": "lora",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": None,
    "target_parameters": None,
    "layers_to_transform": None,
    "rank_pattern": (),
    "alpha_pattern": (),
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
    "finetune_vision_layers": True,
    "finetune_language_layers": True,
    "finetune_attention_modules": True,
    "finetune_mlp_modules": True,
    "finetune_experts": None,
}
"""The section of a spec that names nothing, in the identity of trainings from when
finetune_attention_modules was true by default."""


def test_attention_that_is_left_unset_counts_as_true_where_it_selects_the_same(
    spec: JobSpec,
) -> None:
    def of(lora: dict[str, Any], family: str = "auto") -> tuple[str, object]:
        changed = replace(
            spec, lora=replace(spec.lora, **lora), model=replace(spec.model, family=family)
        )
        inputs = StageInputs(changed, 1)
        counted = inputs.checkpoint_identity().parts["lora.finetune_attention_modules"]
        return inputs.fingerprint("train", {}), counted

    assert spec.lora.finetune_attention_modules is None
    parts = (
        StageInputs(replace(spec, lora=replace(spec.lora, r=16, lora_alpha=32)), 1)
        .checkpoint_identity()
        .parts
    )
    found = {k.removeprefix("lora."): v for k, v in parts.items() if k.startswith("lora.")}
    assert found == FORMER_LORA
    written = {"finetune_attention_modules": True}
    for same in ({}, {"finetune_vision_layers": False}, {"target_modules": ("q_proj",)}):
        assert of(same) == of(same | written)
    for other in ({"finetune_mlp_modules": False}, {"finetune_language_layers": False}):
        assert of(other)[1] is None  # the vision tower's attention, too
        assert of(other)[0] != of(other | written)[0]
        assert of(other, "vlm") == of(other | written, "vlm")


@pytest.mark.parametrize("key", SELECTING_KEYS)
def test_what_is_kept_of_a_training_runs_the_stage_again_and_not_the_steps(
    spec: JobSpec, key: str
) -> None:
    changed = replace(spec, train=replace(spec.train, **{key: another(getattr(spec.train, key))}))
    before, after = given(spec), given(changed)
    assert {stage for stage in before if before[stage] == after[stage]} == {"prep", "baseline"}


def given(spec: JobSpec) -> dict[Stage, str]:
    """The fingerprint of each stage."""
    inputs = StageInputs(spec, 1)
    stages: tuple[Stage, ...] = ("prep", "baseline", "train", "eval", "export", "report")
    return {stage: inputs.fingerprint(stage, {}) for stage in stages}


def test_keys_of_a_base_in_4_bits_count_only_if_it_is_in_4_bits(spec: JobSpec) -> None:
    def of(**model: Any) -> list[str]:
        inputs = StageInputs(replace(spec, model=replace(spec.model, **model)), 1)
        named = inputs.checkpoint_identity().parts
        assert ("model.load_in_4bit" in named) is bool(model.get("load_in_4bit"))
        stages: tuple[Stage, ...] = ("prep", "baseline", "train")
        return [inputs.fingerprint(stage, {}) for stage in stages]

    plain, packed = of(), of(load_in_4bit=True)
    assert of(bnb_4bit_quant_type="fp4") == plain
    assert packed[0] == plain[0]
    assert not {*packed[1:]} & {*plain[1:]}
    assert not {*of(load_in_4bit=True, bnb_4bit_quant_type="fp4")[1:]} & {*packed[1:]}


def test_the_permission_to_run_code_trains_nothing_again() -> None:
    spec = load_spec(Path("specs/latex-grpo.yaml").read_text(), "spec", environ={}).spec
    assert spec.reinforce is not None
    allowed = replace(spec, reinforce=replace(spec.reinforce, allow_code=True))
    before, after = StageInputs(spec, 1), StageInputs(allowed, 1)
    assert before.fingerprint("reinforce", {}) == after.fingerprint("reinforce", {})
    assert before.reinforcement_identity({}) == after.reinforcement_identity({})


def test_a_finished_run_without_reinforcement_stays_finished(spec: JobSpec) -> None:
    inputs = StageInputs(spec, 1)
    settings = {**asdict(spec), "model": inputs._model_keys, "lora": inputs._lora_settings}
    for key in ("output", "runtime", "reinforce"):
        settings.pop(key)
    for stage in ("card", "report"):
        assert inputs.fingerprint(stage, {}) == fingerprint(__version__, stage, [[], settings])
    reinforced = load_spec(Path("specs/latex-grpo.yaml").read_text(), "spec", environ={}).spec
    reports = {
        StageInputs(replace(spec, reinforce=own), 1).fingerprint("report", {})
        for own in (None, reinforced.reinforce)
    }
    assert len(reports) == 2


def test_a_training_of_other_processes_is_known_by_their_number_and_how_they_held_the_model(
    spec: JobSpec,
) -> None:
    """One process may not ask for fsdp2, so it cannot name a complete training of it itself."""

    def trained(distributed: Literal["auto", "ddp", "fsdp2"], processes: int) -> str:
        runtime = replace(spec.runtime, distributed=distributed)
        return StageInputs(replace(spec, runtime=runtime), processes).fingerprint("train", {})

    others = StageInputs(spec, 1).trained_by_others(8)
    found = [each.fingerprint("train", {}) for each in others]
    assert found == [trained("ddp", 8), trained("fsdp2", 8)]
    assert trained("auto", 1) not in found

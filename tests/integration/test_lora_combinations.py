"""Keys of `lora` together, each combination through a whole job: prep, train, eval, export, proof.

The fast ones hold every pair of keys that touch the same code; the others are slow.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from job.cli.app import app
from job.errors import DataError, SpecError
from job.planning import sizes
from job.prep.formulas import render_latex
from job.spec.load import load_spec
from tests.jobs import read_json
from tests.models import BUILDERS

slow = pytest.mark.slow
LANGUAGE_OFF = {"finetune_language_layers": False}


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str = "ernie"
    lora: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


FAST: dict[str, Case] = {
    "every linear module, DoRA, biases, dropout": Case(
        lora={
            "target_modules": "all-linear",
            "use_dora": True,
            "use_rslora": True,
            "lora_dropout": 0.1,
            "bias": "all",
        }
    ),
    "routers and experts in bf16": Case(
        lora={
            "target_modules": ["q_proj"],
            "target_parameters": ["gate.weight", "experts.down_proj"],
        },
        dtype="bfloat16",
    ),
    "vision alone, biases of its layers": Case(
        lora={**LANGUAGE_OFF, "bias": "lora_only"}, train={"fit": "on"}
    ),
    "vision alone, padded": Case(model="qwen_vl", lora=LANGUAGE_OFF),
    "ranks and alphas by pattern, experts, two layers, tied embeddings in full": Case(
        lora={
            "finetune_experts": True,
            "layers_to_transform": [0, 2],
            "rank_pattern": {"q_proj": 8, r"experts\..*": 1, ".*_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.o_proj": 1},
            "use_rslora": True,
            "modules_to_save": ["lm_head"],
        },
        dtype="bfloat16",
    ),
}
SLOW: dict[str, Case] = {
    "modules in full beside DoRA and biases": Case(
        lora={
            "target_modules": ["q_proj", "o_proj"],
            "use_dora": True,
            "bias": "all",
            "modules_to_save": ["resampler_model", "layers.1.input_layernorm", "vision_tower.ln"],
        }
    ),
    "an output layer in full and a connector": Case(
        model="idefics3",
        lora={"modules_to_save": ["lm_head", "connector"], "layers_to_transform": 0},
        train={"gradient_checkpointing": True},
    ),
    "vision alone, ERNIE padded": Case(
        lora=LANGUAGE_OFF, train={"padding_free": False, "gradient_checkpointing": True}
    ),
    "vision alone, images in squares": Case(
        model="idefics3", lora=LANGUAGE_OFF, train={"gradient_checkpointing": True}
    ),
    "experts by the toggle, biases": Case(lora={"finetune_experts": True, "bias": "all"}),
    "experts alone": Case(
        lora={
            "finetune_experts": True,
            "finetune_attention_modules": False,
            "finetune_mlp_modules": False,
        },
        dtype="bfloat16",
    ),
    "a matrix as a bare parameter": Case(
        lora={"target_modules": ["o_proj"], "target_parameters": ["q_proj.weight"]}
    ),
    "routers alone, padded": Case(
        lora={"target_modules": ["fc1"], "target_parameters": ["gate.weight"]},
        train={"padding_free": False, "gradient_checkpointing": True},
        dtype="bfloat16",
    ),
    "the output layer": Case(model="idefics3", lora={"target_modules": ["lm_head"]}),
    "the output layer and every other": Case(
        model="idefics3", lora={"target_modules": ".*(proj|fc.|lm_head)", "bias": "lora_only"}
    ),
    "the output layer with DoRA and dropout": Case(
        model="idefics3",
        lora={"target_modules": ["lm_head"], "use_dora": True, "lora_dropout": 0.1},
    ),
    "every linear module of a padded model, biases": Case(
        model="qwen_vl", lora={"target_modules": "all-linear", "bias": "all", "use_dora": True}
    ),
    "attention alone, biases of its layers": Case(
        model="qwen_vl", lora={"finetune_mlp_modules": False, "bias": "lora_only"}
    ),
    "biases in bf16": Case(lora={"bias": "all"}, dtype="bfloat16"),
    "an expression and rsLoRA": Case(
        lora={
            "target_modules": r".*layers\.[01]\..*_proj",
            "finetune_experts": False,  # they would be reached, and PEFT has no dropout for them
            "use_rslora": True,
            "lora_dropout": 0.5,
        }
    ),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second row without an image, and one image a row of the others."""
    place = tmp_path_factory.mktemp("rows")
    written = []
    for number in range(24):
        asked: list[dict[str, str]] = [{"type": "text", "text": f"{number} ="}]
        if number % 2:
            drawn = render_latex(f"x^{{{number}}}")
            assert drawn is not None
            drawn.save(place / f"{number}.png")
            asked.insert(0, {"type": "image", "image": f"{number}.png"})
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"x {number}"}]
        written.append(json.dumps({"messages": said}))
    (place / "rows.jsonl").write_text("\n".join(written) + "\n")
    return place / "rows.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    @functools.cache
    def built(kind: str) -> dict[str, Any]:
        if kind == "ernie":
            return {"model_name_or_path": "builtin://ernie-vl-tiny", "init": "random"}
        place = tmp_path_factory.mktemp(kind)
        BUILDERS[kind](place)
        return {"model_name_or_path": str(place)}

    return built


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def written(
    tmp_path: Path, rows: Path, models: Callable[[str], dict[str, Any]], cache: Path
) -> Callable[[Case], Path]:
    def write(case: Case) -> Path:
        spec = {
            "version": 1,
            "name": "combination",
            "model": {**models(case.model), "dtype": case.dtype},
            "data": {"train": {"uri": str(rows)}, "eval_fraction": 0.2},
            "lora": {"r": 2, "lora_alpha": 4, **case.lora},
            "train": {
                # One row a pass and a step: half of the steps have no image.
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "max_steps": 6,
                "warmup_steps": 0,
                "learning_rate": 0.01,
                "max_length": 512,
                "gradient_checkpointing": False,
                **case.train,
            },
            "eval": {
                "max_samples": 1,
                "metrics": ["exact_match"],
                "generation": {"max_new_tokens": 1},
                "baseline": False,
            },
            "export": {"merged": {"layout": "transformers"}},
            "output": {"uri": str(tmp_path / "out")},
            "runtime": {"cache_dir": str(cache), "accelerator": "cpu"},
        }
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        return tmp_path / "spec.yaml"

    return write


def here(*arguments: str) -> None:
    """Runs the command in this process: it raises its errors as they are."""
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=slow) for name in SLOW)], ids=str
)
def test_what_validate_takes_runs_to_its_proof(name: str, written: Callable[[Case], Path]) -> None:
    spec = written({**FAST, **SLOW}[name])
    here("validate", str(spec))
    here("run", str(spec))
    run = read_json(spec.parent / "out" / "run.json")
    assert run["status"] == "succeeded"
    proof = run["stages"]["export"]["summary"]
    assert proof["adapter_reloaded"] is not None
    assert proof["merged_reloaded"] is not None
    assert proof["trained_against_base"]["relative_rms"] > 0
    assert proof["changed_tensors"] > 0
    # What the plan counts is what was trained.
    planned = sizes.measure(load_spec(spec.read_text(), "spec.yaml", environ={}).spec)
    assert planned.trainable == run["stages"]["train"]["summary"]["trainable_parameters"]


REFUSED: dict[str, tuple[Case, str]] = {
    "a tied output layer": (
        Case(lora={"target_modules": ["q_proj", "lm_head"]}),
        "names the output layer, which shares its weight with the embeddings",
    ),
    "a tied output layer by an expression": (
        Case(model="qwen_vl", lora={"target_modules": "lm_head"}),
        "names the output layer, which shares its weight with the embeddings",
    ),
    "a norm as a module": (
        Case(lora={"target_modules": ["input_layernorm"]}),
        "which is not a linear module: LoRA adapts no others",
    ),
    "a norm as a parameter": (
        Case(lora={"target_parameters": ["norm.weight"]}),
        "LoRA adapts only matrices",
    ),
    "embeddings as a parameter": (
        Case(lora={"target_parameters": ["embed_tokens.weight"]}),
        "which the output layer shares: LoRA does not adapt them",
    ),
    "a parameter of an adapted module": (
        Case(lora={"target_parameters": ["q_proj.weight"]}),
        "which lora.target_modules or the toggles adapt already",
    ),
    "parameters that no gradient reaches": (
        Case(lora={"target_parameters": ["layers.3.mlp.vision_moe.experts.down_proj"]}),
        "names parameters that get no gradient",
    ),
    "experts by name, with dropout": (
        Case(lora={"target_modules": ["down_proj"], "lora_dropout": 0.1}),
        "target_modules reaches routed experts",
    ),
    "experts of a family without": (
        Case(model="qwen_vl", lora={"finetune_experts": True}),
        "selects bare parameters",
    ),
    "a loss of routers that there are none of": (
        Case(model="qwen_vl", train={"router_aux_loss_coef": 0.1}),
        "weights a loss that Transformers' Qwen2_5_VLForConditionalGeneration does not compute",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_cannot_do_is_refused_by_plan_and_before_any_stage(
    name: str, written: Callable[[Case], Path]
) -> None:
    case, message = REFUSED[name]
    spec = written(case)
    for command in ("plan", "run"):
        with pytest.raises(SpecError, match=message):
            here(command, str(spec))
    assert read_json(spec.parent / "out" / "run.json")["stages"] == {}


def test_vision_alone_is_not_trained_on_rows_without_any_image(
    tmp_path: Path, written: Callable[[Case], Path]
) -> None:
    spec = written(Case(lora=LANGUAGE_OFF))
    rows = [
        [{"role": "user", "content": f"{n} + 1"}, {"role": "assistant", "content": f"{n + 1}"}]
        for n in range(20)
    ]
    lines = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (tmp_path / "text.jsonl").write_text(lines)
    sets = (f"data.train.uri={tmp_path / 'text.jsonl'}", "data.text_only=true")
    with pytest.raises(DataError, match="no training row has an image"):
        here("run", str(spec), *(item for each in sets for item in ("--set", each)))

"""Groups of weights with learning rates of their own: what PEFT's LoRA+ makes, and the tower's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, TrainingArguments

from job import families
from job.engines.data_timer import DataTimer
from job.engines.parameter_groups import NAME, LearningRates, parameter_groups
from job.families.vision_tower import vision_tower_pattern
from job.train.checkpoint.safetensors_trainer import SafetensorsTrainer
from job.train.sampler import DistributedBatchSampler, shuffled
from tests.models import BUILDERS
from tests.unit.families.test_packed_step import EXPERTS, TARGETS, TINY

TOWERS = {
    "llama": None,
    "qwen_vl": ("model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.mlp.0.weight"),
    "idefics3": (
        "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.connector.modality_projection.proj.weight",
    ),
}


@pytest.fixture(scope="module")
def ernie() -> Any:
    read = families.read_checkpoint("tiny", TINY)
    return lambda: families.Ernie45VL.architecture("tiny", read.config)


@pytest.mark.parametrize("name", TOWERS)
def test_the_vision_tower_is_found_by_name_and_its_connector_is_no_part_of_it(
    name: str, tmp_path: Path
) -> None:
    BUILDERS[name](tmp_path)
    auto: Any = AutoModelForCausalLM if name == "llama" else AutoModelForImageTextToText
    model = auto.from_pretrained(tmp_path)
    pattern, expected = vision_tower_pattern(model), TOWERS[name]
    if expected is None:
        assert pattern is None
        return
    assert pattern is not None
    inside, connector = expected
    names = {parameter for parameter, _ in model.named_parameters()}
    assert {inside, connector} <= names
    matched = {each for each in names if pattern.match(each)}
    assert inside in matched
    assert connector not in matched
    assert not any("language_model" in each or "text_model" in each for each in matched)


def test_the_tower_of_ernie_ends_before_its_resampler(ernie: Any) -> None:
    pattern = vision_tower_pattern(ernie())
    assert pattern is not None
    assert pattern.match("model.vision_tower.blocks.0.mlp.fc1.weight")
    assert not pattern.match("model.resampler_model.spatial_linear.fc1.weight")
    assert not pattern.match("model.language_model.layers.0.mlp.up_proj.weight")


def adapted(skeleton: Any, *, dora: bool = False) -> Any:
    config = LoraConfig(
        r=2,
        target_modules=TARGETS,
        target_parameters=None if dora else EXPERTS,
        use_dora=dora,
        bias="lora_only" if dora else "none",
    )
    return get_peft_model(skeleton.to_empty(device="cpu"), config)


def rates_of(groups: Any) -> dict[int, float]:
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("dora", [False, True], ids=["routed experts", "DoRA and biases"])
def test_loraplus_gives_each_weight_the_learning_rate_that_peft_gives_it(
    ernie: Any, dora: bool
) -> None:
    model = adapted(ernie(), dora=dora)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = LearningRates(base=1e-3, loraplus_lr_ratio=16)
    ours = parameter_groups(model, rates, weight_decay=0.1, decayed=())
    found = rates_of(ours)
    assert found == rates_of(theirs.param_groups)
    assert len(found) == sum(parameter.requires_grad for parameter in model.parameters())
    assert set(found.values()) == {1e-3, 1.6e-2}


def test_the_vision_tower_has_its_own_rate_and_biases_and_norms_no_decay(ernie: Any) -> None:
    model = adapted(ernie())
    rates = LearningRates(base=1e-3, vision_tower=1e-4, loraplus_lr_ratio=4)
    decayed = {name for name, _ in model.named_parameters() if "experts" not in name}
    groups = parameter_groups(model, rates, weight_decay=0.1, decayed=decayed)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            expected = 1e-4 if "vision_tower" in name else 1e-3
            assert group["lr"] == expected * (4 if "lora_B" in name else 1), name
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
    assert [(g[NAME], g["weight_decay"]) for g in groups] == [
        ("base", 0.1),
        ("base", 0.0),
        ("vision_tower", 0.1),
        ("lora_B", 0.1),
        ("lora_B", 0.0),
        ("vision_tower_lora_B", 0.1),
    ]


class Seen(torch.nn.Module):
    """Two matrices with the names of a model's parts, and their biases."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)

    def get_encoder(self, modality: str) -> torch.nn.Module:
        return self.vision_tower

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(loss=self.head(self.vision_tower(input_ids)).square().mean())


def collate(rows: list[int]) -> dict[str, Any]:
    values = torch.tensor(rows, dtype=torch.float)[:, None] * torch.ones(3) / 8
    return {"input_ids": values, "counted_tokens": len(rows), "tokens": len(rows), "images": 0}


def test_steps_are_those_of_adamw_with_each_rate_warmed_up_decayed_and_logged(
    tmp_path: Path,
) -> None:
    torch.manual_seed(3)
    model = Seen()
    by_hand = Seen()
    by_hand.load_state_dict(model.state_dict())
    trainer = SafetensorsTrainer(
        batch_sampler=DistributedBatchSampler(shuffled(8, 0), 8, micro_batches=1),
        data_timer=DataTimer(),
        learning_rates=LearningRates(base=0.1, vision_tower=0.01),
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            learning_rate=0.1,
            weight_decay=0.2,
            warmup_steps=2,
            max_steps=4,
            max_grad_norm=0,
            optim="adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=list(range(8)),
        data_collator=collate,
    )
    trainer.train()
    optimizers = [
        torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.2 * (parameter.ndim > 1))
        for parameter in by_hand.parameters()
    ]
    peaks = [0.01, 0.01, 0.1, 0.1]
    factors = [0.0, 0.5, 1.0, 0.5]
    batch = collate(list(range(8)))["input_ids"]
    for factor in factors:
        by_hand(batch).loss.backward()
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logged] == [0.1 * each for each in factors]
    for group, peak in (("base", 0.1), ("vision_tower", 0.01)):
        rates = [entry[f"learning_rate/{group}"] for entry in logged]
        assert rates == [peak * each for each in factors], group

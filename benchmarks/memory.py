"""Compares the memory that training takes on a GPU with the estimate of `job plan`.

    python -m benchmarks.memory --model 28b --layers 28

Each configuration runs the product's train stage for a few steps on the rows that need the most
memory; weights are random, and rows have the sizes of real formulas. The peak is the memory that
the allocator reserves, which is what has to fit on a GPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.training import (
    SPEC,
    UNVALIDATED,
    formula_rows,
    random_model,
    tiny_family,
    train_stage,
)
from job.engines.device import Accelerator, detect, release_memory
from job.engines.memory import estimate
from job.families.encoded import RowSize
from job.planning.sizes import GIB
from job.prep.rows import Row
from job.spec.load import load_spec
from job.spec.types import JobSpec

STEPS, ROWS = 4, 192
SETTINGS: dict[str, Any] = {
    "lora.r": 8,
    "lora.lora_alpha": 16,
    "train.max_length": 2048,
    "train.gradient_accumulation_steps": 1,
    "train.max_steps": STEPS,
    "train.logging_steps": 1,
    "train.save_steps": 100,
    "train.warmup_steps": 0,
    "train.fit": "off",
    "train.optim": "adamw_torch_fused",
    "train.gradient_checkpointing": False,
    "train.dataloader_num_workers": 2,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "2 rows": {"train.per_device_train_batch_size": 2},
    "16 rows": {"train.per_device_train_batch_size": 16},
    "32 rows": {"train.per_device_train_batch_size": 32},
    "64 rows, checkpointing": {
        "train.per_device_train_batch_size": 64,
        "train.gradient_checkpointing": True,
    },
    "16 rows, padded": {"train.per_device_train_batch_size": 16, "train.padding_free": False},
    "8 rows, routed experts": {
        "train.per_device_train_batch_size": 8,
        "lora.finetune_experts": True,
    },
    "16 rows, language alone": {
        "train.per_device_train_batch_size": 16,
        "lora.finetune_vision_layers": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "28b"), default="28b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model's")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    spec = settings({})
    accelerator = detect(spec.runtime)
    family = tiny_family(spec)
    model: Any = random_model(arguments.model, arguments.layers, family, accelerator.device)
    original_class = type(model)
    found = {}
    for name in arguments.only:
        spec = settings(CONFIGURATIONS[name])
        found[name] = measure(spec, accelerator, family, model)
        print(name, json.dumps(found[name]), flush=True)
        model.__class__ = original_class
    record.write(
        f"memory-{arguments.model}-{accelerator.kind}",
        "benchmarks.memory",
        accelerator.name,
        {
            "layers": model.config.text_config.num_hidden_layers,
            "configurations": found,
            "farthest_off": max((each["ratio"] for each in found.values()), key=relative_error),
        },
        ("torch", "transformers", "peft"),
        arguments.results,
    )


def relative_error(ratio: float) -> float:
    return abs(ratio - 1)


def settings(more: dict[str, Any]) -> JobSpec:
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**SETTINGS, **more}.items()]
    overrides += UNVALIDATED
    return load_spec(SPEC.read_text(), str(SPEC), overrides, environ={}).spec


def heaviest(spec: JobSpec, family: Any) -> tuple[list[Row], list[RowSize]]:
    """The rows of the spec's heaviest micro-batch, and their sizes."""
    rows = list(formula_rows(ROWS))
    sizes = [family.row_size(family.encode(row)) for row in rows]
    batch_size = spec.train.per_device_train_batch_size
    chosen = sorted(range(ROWS), key=lambda n: sizes[n].tokens, reverse=True)[:batch_size]
    return [rows[n] for n in chosen], [sizes[n] for n in chosen]


def measure(spec: JobSpec, accelerator: Accelerator, family: Any, model: Any) -> dict[str, float]:
    """Trains a few steps on the heaviest rows, and compares the peaks."""
    rows, sizes = heaviest(spec, family)
    planned = estimate(type(family), model, spec, sizes, accelerator)
    assert planned is not None  # noqa: S101
    result, trained, _ = train_stage(spec, accelerator, family, model, rows)
    trained.gradient_checkpointing_disable()
    trained.unload()
    release_memory()
    measured = result.peak_memory_bytes
    return {
        "measured_gib": round(measured / GIB, 2),
        "planned_gib": round(planned.total / GIB, 2),
        "ratio": round(planned.total / measured, 3),
        "tokens_a_pass": sum(size.tokens for size in sizes),
        "patches_a_pass": sum(sum(size.patches) for size in sizes),
    }


if __name__ == "__main__":
    main()

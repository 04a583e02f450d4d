"""Measures the train stage: eager, captured, compiled, and both, by the rows of a step.

    python -m benchmarks.train_stage                       the tiny model, on this machine
    python -m benchmarks.train_stage --model 28b           the published one, on a GPU

Every line is a training by the product's own stage, with its data workers, callbacks and optimizer,
on random weights and rows with the sizes of real formulas. Tokens are counted without padding. The
first steps are not counted; captures and compilation are reported beside the speed.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.training import (
    SPEC,
    UNVALIDATED,
    formula_rows,
    random_model,
    speed_of,
    tiny_family,
)
from benchmarks.training import train_stage as run
from job.engines.device import Accelerator, detect, release_memory
from job.errors import JobError
from job.families.grouped_products import choice as grouped_products
from job.spec.load import load_spec
from job.spec.types import JobSpec

WARM_UP = 4
"""Steps that are not counted."""
LONG = 27
"""Pictures of a long row: with their questions and answers, about 4,096 tokens."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    rows: int
    experts: bool
    captured: bool = True
    compiled: bool = False
    passes: int = 1
    checkpointing: bool = False
    pictures: int = 1
    """Of a row, with a question and an answer to each."""
    r: int = 8
    """The adapter's rank."""

    def __str__(self) -> str:
        how = [name for name in ("captured", "compiled") if getattr(self, name)]
        how += ["checkpointing"] * self.checkpointing
        targets = "with routed experts" if self.experts else "without routed experts"
        passes = f" in {self.passes} passes" if self.passes > 1 else ""
        pictures = f" of {self.pictures} pictures" if self.pictures > 1 else ""
        rank = f", r {self.r}" if self.pictures > 1 else ""
        what = f"{self.rows} rows{pictures}{passes}, {targets}{rank}"
        return f"{what}, {' and '.join(how) or 'eager'}"


def variants() -> list[Variant]:
    """In order of interest: a run that is cut short has the first ones."""
    shipped = [Variant(rows=4, experts=experts) for experts in (True, False)]
    before = Variant(rows=4, experts=True, captured=False, passes=2, checkpointing=True)
    eager = [replace(each, captured=False) for each in shipped]
    larger = [replace(each, rows=16) for each in shipped]
    compiled = [replace(each, compiled=True) for each in (*shipped, *larger)]
    largest = [
        Variant(rows=rows, experts=experts, compiled=True, captured=captured)
        for rows, experts in ((64, True), (92, False))
        for captured in (True, False)
    ]
    as_many_as_fit = Variant(rows=72, experts=True, compiled=True)
    long = [
        Variant(rows=2, experts=experts, compiled=True, pictures=LONG, r=r)
        for experts in (True, False)
        for r in (8, 64)
    ]
    recomputed = [replace(each, checkpointing=True) for each in shipped]
    every = [shipped[0], before, *eager, shipped[1], *larger, *compiled, *largest, *long]
    return [*every, *recomputed, as_many_as_fit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "28b"), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model's")
    parser.add_argument("--steps", type=int, default=24, help="steps of each training")
    parser.add_argument("--logging-steps", type=int, default=1, help="steps of a line of the log")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the variants to measure")
    parser.add_argument("--optim", help="another optimizer than the machine's default")
    parser.add_argument(
        "--products",
        choices=grouped_products.KERNELS,
        help="what computes grouped products",
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    if arguments.products:
        asked = grouped_products.Choice(arguments.products, "asked for")
        grouped_products.use(torch.bfloat16, asked)
    accelerator = detect(load_spec(SPEC.read_text(), str(SPEC), environ={}).spec.runtime)
    family = tiny_family(spec_of(variants()[0], arguments, accelerator))
    model = random_model(arguments.model, arguments.layers, family, accelerator.device)
    measured: dict[str, dict[str, Any]] = {}
    for number, variant in enumerate(variants()):
        if arguments.only and number not in arguments.only:
            continue
        spec = spec_of(variant, arguments, accelerator)
        try:
            measured[str(variant)] = measure(spec, accelerator, family, model, variant.pictures)
        except JobError as error:  # one that does not fit must not end the others
            measured[str(variant)] = {"error": str(error).partition("\n")[0]}
        print(variant, json.dumps(measured[str(variant)]), flush=True)
        release_memory()
        write(arguments, accelerator, model, measured)


def spec_of(variant: Variant, arguments: argparse.Namespace, accelerator: Accelerator) -> JobSpec:
    on_gpu = accelerator.kind != "cpu"
    settings = {
        "lora.r": variant.r,
        "lora.lora_alpha": 2 * variant.r,
        "lora.finetune_experts": variant.experts,
        "train.max_length": 2048 if variant.pictures == 1 else 8192,
        "train.per_device_train_batch_size": variant.rows // variant.passes,
        "train.gradient_accumulation_steps": variant.passes,
        "train.gradient_checkpointing": variant.checkpointing,
        "train.max_steps": arguments.steps,
        "train.logging_steps": arguments.logging_steps,
        "train.save_steps": 10 * arguments.steps,
        "train.torch_compile": variant.compiled and on_gpu,
        "train.cuda_graphs": variant.captured,
        "train.optim": arguments.optim or "auto",
        "train.dataloader_num_workers": 8 if on_gpu else 0,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    # As two passes with checkpointing were asked for, they are not made one.
    overrides += [f"train.fit={'off' if variant.checkpointing else 'auto'}", *UNVALIDATED]
    return load_spec(SPEC.read_text(), str(SPEC), overrides, environ={}).spec


def measure(
    spec: JobSpec, accelerator: Accelerator, family: Any, model: Any, pictures: int
) -> dict[str, Any]:
    all_rows = list(formula_rows(spec.train.rows_a_step * spec.train.max_steps, pictures))
    result, trained, history = run(spec, accelerator, family, model, all_rows)
    trained.unload()
    first = WARM_UP + spec.train.logging_steps  # the first line whose steps all count
    steps = [entry for entry in history if "loss" in entry and entry["step"] >= first]
    return {
        **speed_of(result, steps),
        "loop_seconds": result.seconds,
        "fit": result.fit,
        "captured": result.captured,
        "optim": result.optim,
        "trainable": result.trainable_parameters,
    }


def write(
    arguments: argparse.Namespace,
    accelerator: Accelerator,
    model: torch.nn.Module,
    measured: dict[str, dict[str, Any]],
) -> None:
    config: Any = model.config
    record.write(
        f"train-stage-{arguments.model}-{accelerator.kind}",
        "benchmarks.train_stage",
        accelerator.name,
        {
            "layers": config.text_config.num_hidden_layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": arguments.steps,
            "logging_steps": arguments.logging_steps,
            "products": arguments.products,
            "trainings": measured,
        },
        ("torch", "transformers", "peft"),
        arguments.results,
    )


if __name__ == "__main__":
    main()

"""Measures LoRA training: the product's step beside plain Transformers and the tutorial's way.

    python -m benchmarks.training                                   the tiny model, on this CPU
    python -m benchmarks.training --model 28b --layers 28 --rows 32 the published one, on a GPU

Weights are random, rows have the sizes of real formulas (benchmarks/im2latex_sizes.json), and all
ways train the same rows with the same adapter in one run. Tokens are counted without padding.
"""

import argparse
import copy
import gc
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from job import families, inputs
from job.engines import cpu
from job.families.base import SORTED_EXPERTS, Batch, Encoded, to_device
from job.families.ernie45_vl import Ernie45VL
from job.prep.images import inspect
from job.prep.records import Message, Part, Row
from job.spec.load import load_spec

PUBLISHED = "hf://baidu/ERNIE-4.5-VL-28B-A3B-PT"
HERE = Path(__file__).parent
SPEC = HERE.parent / "specs" / "latex.yaml"
INDICES = ("image_cu_seqlens", "image_position_ids", "position_ids")
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train."""

    experts: str
    attention: str
    packed: bool = False
    indices: bool = True
    """Whether positions and vision indices come with the batch."""
    rows: int | None = None
    """Rows a step where it is not the run's own."""


WAYS = {
    "tutorial": Way(experts="eager", attention="eager", indices=False, rows=2),
    "transformers": Way(experts="grouped_mm", attention="sdpa", indices=False),
    "padded": Way(experts="grouped_mm", attention="sdpa"),
    "packed": Way(experts="grouped_mm", attention="sdpa", packed=True),
    "packed, sorted experts": Way(experts=SORTED_EXPERTS, attention="sdpa", packed=True),
}
BASELINE = "transformers"
JOB = "packed, sorted experts"
"""The way of a job with default settings on a GPU; on a CPU the ways with experts differ little."""


def main() -> None:
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = load_spec(SPEC.read_text(), str(SPEC), environ={}).spec
    family = Ernie45VL.bind(
        families.read_checkpoint("builtin://ernie-vl-tiny", inputs.MODELS / "ernie-vl-tiny"),
        spec.data,
    )
    encoded = encoded_rows(family, arguments.steps * arguments.rows)
    model = random_model(arguments.model, arguments.layers, family, device)
    targets = family.lora_targets(model, spec.lora)
    measured = {}
    for name in arguments.ways:
        way = WAYS[name]
        rows = min(way.rows or arguments.rows, arguments.rows)
        batches = [
            _batch(family, encoded[i : i + rows], way)
            for i in range(0, arguments.steps * rows, rows)
        ]
        measured[name] = _measure(family, model, targets.modules, way, batches, device)
        print(name, json.dumps(measured[name]), flush=True)
    result = {
        # A CPU's speed counts where there are as many cores; a GPU's name says all.
        **({"cores": cpu.cores()} if device.type == "cpu" else {}),
        "rows_a_step": arguments.rows,
        "layers": model.config.text_config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ways": measured,
        "speeds": _speeds(measured, arguments.rows),
        **_headline(measured),
    }
    record.write(
        f"training-{arguments.model}-{device.type}",
        "benchmarks.training",
        torch.cuda.get_device_name() if device.type == "cuda" else cpu.model(),
        result,
        ("torch", "transformers", "peft"),
        arguments.results,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "28b"), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model's")
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--steps", type=int, default=8, help="steps, of which two are not counted")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder to write to")
    return parser.parse_args()


def formula_rows(count: int) -> Iterator[Row]:
    sizes = json.loads((HERE / "im2latex_sizes.json").read_text())["rows"]
    noise = np.random.default_rng(0)
    for number in range(count):
        width, height, characters = sizes[number % len(sizes)]
        file = io.BytesIO()
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        answer = "".join(noise.choice(list("abcdefgxyz+-=()"), max(1, characters // 2)))
        question = (Part(image=0), Part(text="Write the LaTeX representation for this image."))
        yield Row(
            id=f"row:{number}",
            messages=(
                Message(role="user", parts=question),
                Message(role="assistant", parts=(Part(text=answer),)),
            ),
            images=(inspect(file.getvalue()),),
        )


def encoded_rows(family: Any, count: int) -> list[Encoded]:
    """Rows with the sizes of real formulas, as tokens."""
    return [family.encode(row) for row in formula_rows(count)]


def random_model(name: str, layers: int | None, family: Any, device: torch.device) -> Any:
    """The model with random weights: fp32 on a CPU, bf16 on a GPU."""
    if name == "tiny":
        return family.initialise(
            seed=0, dtype=torch.float32, device=device, attn_implementation="sdpa"
        )
    config = Ernie45VL.architecture(PUBLISHED, Ernie45VL.known(PUBLISHED) or {}).config
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.mlp_layer_types = config.text_config.mlp_layer_types[:layers]
    for kind in ("image_token_id", "image_start_token_id", "image_end_token_id"):
        setattr(
            config, kind, getattr(family.processor, kind)
        )  # the rows' tokenizer is the tiny one
    return drawn(config, family, device)


def drawn(config: Any, family: Any, device: torch.device) -> Any:
    """A model of the config in bf16: its matrices random, norms and routers' biases as made.

    Random norms and biases would send all tokens to the same few experts.
    """
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = Ernie4_5_VLMoeForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and ".moe_statics." not in name:
            torch.nn.init.normal_(parameter, std=0.02)
        if family.keeps_fp32(name):
            parameter.data = parameter.data.float()
    return model


def _batch(family: Ernie45VL, rows: list[Encoded], way: Way) -> Batch:
    if way.packed:
        return family.pack(rows)
    batch = family.collate(rows)
    return batch if way.indices else {k: v for k, v in batch.items() if k not in INDICES}


def _measure(
    family: Ernie45VL,
    base: Any,
    targets: tuple[str, ...],
    way: Way,
    batches: list[Batch],
    device: torch.device,
) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    cuda = device.type == "cuda"
    model = base if cuda else copy.deepcopy(base)  # there is no room for two on a GPU
    native = type(model)
    if way.packed:
        family.use_packed_step(model)
    family.use_experts(model, way.experts)
    model.set_attn_implementation(way.attention)
    adapted = get_peft_model(
        model.requires_grad_(False), LoraConfig(r=8, lora_alpha=16, target_modules=list(targets))
    ).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=cuda)
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, tokens, losses = [], [], []
    for batch in batches:
        real = (
            batch["attention_mask"].sum()
            if "attention_mask" in batch
            else batch["input_ids"].numel()
        )
        tokens.append(int(real))
        synchronize()
        start = time.perf_counter()
        moved = to_device(batch, device)
        if not way.indices:  # the tower makes its indices from the grid, where the grid is
            moved["image_grid_thw"] = batch["image_grid_thw"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = adapted(**moved, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    adapted.unload()
    model.__class__ = native
    del adapted, trained, optimizer
    gc.collect()
    each = [n / s for n, s in zip(tokens[WARM_UP:], seconds[WARM_UP:], strict=True)]
    return {
        "tokens_per_second": round(statistics.median(each), 1),
        "slowest": round(min(each), 1),
        "fastest": round(max(each), 1),
        "seconds_a_step": round(statistics.median(seconds[WARM_UP:]), 4),
        "tokens_a_step": round(statistics.mean(tokens)),
        # A process on a CPU tells but one peak, of all ways together.
        **({"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if cuda else {}),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def _speeds(measured: dict[str, dict[str, float]], rows: int) -> list[dict[str, object]]:
    """The speed of the step that a job takes, as `job plan` reads it."""
    if JOB not in measured:
        return []
    way = measured[JOB]
    return [
        {
            "what": f"{rows} rows a pass, without gradient checkpointing",
            "trained": "lora",
            "tokens_a_pass": way["tokens_a_step"],
            **{key: way[key] for key in ("tokens_per_second", "slowest", "fastest")},
        }
    ]


def _headline(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    if BASELINE not in measured:
        return {}
    best = max(measured.values(), key=lambda way: way["tokens_per_second"])
    baseline = measured[BASELINE]["tokens_per_second"]
    return {
        "tokens_per_second": best["tokens_per_second"],
        "baseline_tokens_per_second": baseline,
        "ratio": round(best["tokens_per_second"] / baseline, 2),
        **{key: best[key] for key in ("peak_gib",) if key in best},
    }


if __name__ == "__main__":
    main()

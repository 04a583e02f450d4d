"""Measures LoRA training: the product's step, plain Transformers and the tutorial's code.

    python -m benchmarks.training                                   the tiny model, on this CPU
    python -m benchmarks.training --model 28b --rows 64             the published one, on a GPU

Weights are random, and rows have the sizes of real formulas (benchmarks/im2latex_sizes.json). A
"way" is one implementation of the training step; all ways of a run train the same rows with the
same adapter. Tokens are counted without padding. The last way is the product's train stage, with
its data workers, batch size finder, callbacks and optimizer.
"""

import argparse
import copy
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import arithmetic, record
from benchmarks.noise_formulas import noise_formulas
from job import engines, families
from job.distributed.cores import cores
from job.engines.compiling import CompiledBlocks, compile_blocks
from job.engines.device import Accelerator, detect, release_memory
from job.families import model_source
from job.families.base import SORTED_EXPERTS
from job.families.batches import Batch, PaddedBatch, to_device
from job.families.encoded import Encoded
from job.families.ernie45_vl import Ernie45VL
from job.families.lora.linear import use_lora_linear
from job.planning.sizes import GIB
from job.prep.images import inspect
from job.prep.prepared_data import PreparedData
from job.prep.rows import Message, Part, Row
from job.prep.shards import Split
from job.spec.load import load_spec
from job.spec.types import JobSpec
from job.train.checkpoint.storage import CheckpointStore
from job.train.result import TrainResult
from job.train.trackers import TrackerFiles
from job.train.train import train
from job.train.train_context import TrainContext

PUBLISHED = "hf://baidu/ERNIE-4.5-VL-28B-A3B-PT"
HERE = Path(__file__).parent
SPEC = HERE.parent / "specs" / "latex.yaml"
UNVALIDATED = (
    "data.validation=null",
    "train.eval_strategy=no",
    "train.eval_steps=null",
    "train.load_best_model_at_end=false",
)
"""The settings that turn off the spec's validation."""
INDICES = ("image_cu_seqlens", "image_position_ids", "position_ids")
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Way:
    """One implementation of the training step."""

    experts: str = "grouped_mm"
    attention: str = "sdpa"
    indices: bool = True
    """Whether the batch contains position ids and vision indices."""
    packed: bool = False
    varlen: bool = False
    """Whether attention uses the varlen kernel, if the device has one."""
    lora_linear: bool = False
    """Whether adapters compute in their base layer's dtype; else as in PEFT."""
    compiled: bool = False
    fused_lora: bool = False
    """Whether adapters are fused into their compiled layers."""
    rows: int | None = None
    """Rows per step, if fewer than the run's."""


SORTED = Way(packed=True, experts=SORTED_EXPERTS, rows=32)  # attention pads rows to a grid
VARLEN = replace(SORTED, varlen=True, rows=None)
WAYS = {
    "tutorial": Way(experts="eager", attention="eager", indices=False, rows=2),
    "transformers": Way(indices=False, rows=16),  # it keeps all logits, including those of padding
    "padded": Way(rows=16),
    "packed": Way(packed=True, rows=32),
    "+ sorted experts": SORTED,
    "+ bounds": VARLEN,
    "+ adapters in bf16": replace(VARLEN, lora_linear=True),
    "+ torch.compile": replace(VARLEN, lora_linear=True, compiled=True),
    "+ one product": replace(VARLEN, lora_linear=True, compiled=True, fused_lora=True),
}
ON_GPU = ("+ bounds", "+ adapters in bf16", "+ torch.compile", "+ one product")
"""Ways that have no effect on a CPU, or do not pay off there."""
JOB = "train stage"
BASELINE = "transformers"


def main() -> None:
    arguments = _arguments()
    spec = _spec(arguments)
    accelerator = detect(spec.runtime)
    device = accelerator.device
    family = tiny_family(spec)
    encoded = encoded_rows(family, arguments.steps * arguments.rows)
    model = random_model(arguments.model, arguments.layers, family, device)
    layers = model.config.text_config.num_hidden_layers
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured = {}
    last = next((name for name in reversed(arguments.ways) if name != JOB), None)
    for name in arguments.ways:
        if name == JOB:
            # Enough rows for one epoch: after each epoch, workers restart with empty queues.
            all_rows = list(formula_rows(spec.train.max_steps * arguments.rows))
            found = _measure_job(family, model, spec, accelerator, all_rows)
        else:
            way = WAYS[name]
            rows = min(way.rows or arguments.rows, arguments.rows)
            batches = [
                _batch(family, encoded[i : i + rows], way)
                for i in range(0, arguments.steps * rows, rows)
            ]
            profile = None
            if arguments.profile is not None and name == last:
                profile = functools.partial(
                    arithmetic.write_profile, path=arguments.profile, way=name, rows=rows
                )
            try:
                found = _measure(family, model, spec, way, batches, device, profile)
            except torch.OutOfMemoryError as error:
                print(name, "does not fit:", error, flush=True)
                break  # frees its memory for the next ones
        measured[name] = found
        print(name, json.dumps(found), flush=True)
    result = {
        # A CPU's speed depends on its cores; a GPU is identified by its name.
        **({"cores": cores()} if device.type == "cpu" else {}),
        "rows_a_step": arguments.rows,
        "layers": layers,
        "parameters": parameters,
        "routed_experts_adapted": arguments.experts,
        "ways": measured,
        **arithmetic.flops_and_mfu(model, family, encoded, device, measured),
        "speeds": _speeds(measured, spec),
        **_headline(measured),
    }
    record.write(
        f"training-{arguments.model}-{device.type}{'-experts' if arguments.experts else ''}",
        "benchmarks.training",
        accelerator.name,
        result,
        ("torch", "transformers", "peft"),
        arguments.results,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "28b"), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model's")
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    parser.add_argument(
        "--steps", type=int, default=8, help="number of steps; the first two are not counted"
    )
    ways = [*WAYS, JOB]
    here = ways if torch.cuda.is_available() else [way for way in ways if way not in ON_GPU]
    parser.add_argument("--ways", nargs="+", choices=ways, default=here)
    parser.add_argument("--experts", action="store_true", help="adapt the routed experts too")
    parser.add_argument("--profile", type=Path, help="file for a profile of the last way")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder to write to")
    return parser.parse_args()


def _spec(arguments: argparse.Namespace) -> JobSpec:
    on_gpu = torch.cuda.is_available()
    settings = {
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "lora.finetune_experts": arguments.experts,
        "train.max_length": 2048,
        "train.per_device_train_batch_size": arguments.rows,
        "train.gradient_accumulation_steps": 1,
        "train.max_steps": 5 * arguments.steps,
        "train.logging_steps": arguments.steps,
        "train.save_steps": 100 * arguments.steps,
        "train.torch_compile": on_gpu,
        "train.optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "train.dataloader_num_workers": 8 if on_gpu else 0,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    overrides += UNVALIDATED
    return load_spec(SPEC.read_text(), str(SPEC), overrides, environ={}).spec


def tiny_family(spec: JobSpec) -> Ernie45VL:
    """The family with the tiny model's tokenizer and processor."""
    tiny = families.read_checkpoint(
        "builtin://ernie-vl-tiny", model_source.MODELS / "ernie-vl-tiny"
    )
    return Ernie45VL.bind(tiny, spec.data)


def formula_rows(count: int, pictures: int = 1) -> Iterator[Row]:
    """Rows of noise, with the sizes of real formulas: conversations with a question and an answer
    to each picture."""
    formulas = noise_formulas(count * pictures, "abcdefgxyz+-=()")
    question = Part(text="Write the LaTeX representation for this image.")
    for number in range(count):
        files, answers = zip(*islice(formulas, pictures), strict=True)
        turns = (
            (
                Message(role="user", parts=(Part(image=image), question)),
                Message(role="assistant", parts=(Part(text=answer),)),
            )
            for image, answer in enumerate(answers)
        )
        yield Row(
            id=f"row:{number}",
            messages=tuple(chain.from_iterable(turns)),
            images=tuple(map(inspect, files)),
        )


def encoded_rows(family: Any, count: int) -> list[Encoded]:
    """Tokenized `formula_rows`."""
    return [family.encode(row) for row in formula_rows(count)]


def random_model(name: str, layers: int | None, family: Any, device: torch.device) -> Any:
    """The model with random weights: `tiny` in fp32, `28b` in bf16."""
    if name == "tiny":
        return family.initialize(
            seed=0, dtype=torch.float32, device=device, attn_implementation="sdpa"
        )
    config = Ernie45VL.architecture(PUBLISHED, Ernie45VL.known_config(PUBLISHED) or {}).config
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.mlp_layer_types = config.text_config.mlp_layer_types[:layers]
    for kind in ("image_token_id", "image_start_token_id", "image_end_token_id"):
        setattr(
            config, kind, getattr(family.processor, kind)
        )  # the rows' tokenizer is the tiny one
    return random_weights(config, family, device)


def random_weights(config: Any, family: Any, device: torch.device) -> Any:
    """Builds the model in bf16, with random matrices.

    Norms and router biases keep their initial values: random biases would route all tokens to the
    same few experts.
    """
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    torch.manual_seed(0)
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
    kept = {k: v for k, v in batch.items() if way.indices or k not in INDICES}
    return cast(PaddedBatch, kept)


def _measure(
    family: Ernie45VL,
    base: Any,
    spec: JobSpec,
    way: Way,
    batches: list[Batch],
    device: torch.device,
    profile: Callable[[Callable[[], Any]], None] | None,
) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    cuda = device.type == "cuda"
    model = base if cuda else copy.deepcopy(base)  # two do not fit on a GPU
    original_classes = type(model), [type(block) for block in _blocks(model)]
    targets = family.lora_targets(model, spec.lora)
    if way.packed:
        family.use_packed_step(model, varlen=way.varlen)
    family.set_experts_implementation(model, way.experts)
    model.set_attn_implementation(way.attention)
    adapted = get_peft_model(
        model.requires_grad_(False),
        LoraConfig(
            r=spec.lora.r,
            lora_alpha=spec.lora.lora_alpha,
            target_modules=list(targets.modules),
            target_parameters=list(targets.parameters) or None,
        ),
    ).train()
    if way.lora_linear:
        use_lora_linear(adapted)
    blocks: CompiledBlocks | None = None
    if way.compiled and cuda:
        blocks = compile_blocks(adapted, fuse=way.fused_lora)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=cuda)
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        release_memory()
        torch.cuda.reset_peak_memory_stats()

    def step(batch: Batch) -> torch.Tensor:
        moved: Any = to_device(batch, device)
        if not way.indices:  # the tower computes its indices from the grid, on the grid's device
            moved["image_grid_thw"] = moved["image_grid_thw"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda and not way.lora_linear):
            loss: torch.Tensor = adapted(**moved, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    seconds, tokens, losses = [], [], []
    for batch in batches:
        mask = batch.get("attention_mask")
        real = batch["input_ids"].numel() if mask is None else cast(torch.Tensor, mask).sum()
        tokens.append(int(real))
        synchronize()
        start = time.perf_counter()
        losses.append(step(batch))
        synchronize()
        seconds.append(time.perf_counter() - start)
    if profile is not None and cuda:
        profile(lambda: step(batches[-1]))
    if blocks is not None:
        blocks.release()
    adapted.unload()
    model.__class__ = original_classes[0]
    for block, kind in zip(_blocks(model), original_classes[1], strict=True):
        block.__class__ = kind
    optimizer.state.clear()
    release_memory()
    each = [n / s for n, s in zip(tokens[WARM_UP:], seconds[WARM_UP:], strict=True)]
    return {
        "tokens_per_second": round(statistics.median(each), 1),
        "slowest": round(min(each), 1),
        "fastest": round(max(each), 1),
        "seconds_a_step": round(statistics.median(seconds[WARM_UP:]), 4),
        "tokens_a_step": round(statistics.mean(tokens)),
        # On a CPU the peak is that of the process, over all ways.
        **({"peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2)} if cuda else {}),
        "first_step_seconds": round(seconds[0], 2),
        "first_loss": round(float(losses[0]), 4),
        "last_loss": round(float(losses[-1]), 4),
    }


def _blocks(model: Any) -> list[Any]:
    return [*model.model.language_model.layers, *model.model.vision_tower.blocks]


@dataclass(frozen=True, kw_only=True)
class InMemoryData(PreparedData):
    """Rows in memory, in place of prep's files."""

    in_memory: Sequence[Row]

    def rows(self, split: Split) -> Sequence[Row]:
        return self.in_memory

    def measured_rows(self) -> Sequence[Row]:
        return self.in_memory


def train_stage(
    spec: JobSpec, accelerator: Accelerator, family: Any, model: Any, rows: Sequence[Row]
) -> tuple[TrainResult, Any, list[dict[str, Any]]]:
    """Runs the train stage as a job does; returns its result, the trained model and the history."""
    engine = engines.create(spec.model, spec.lora, accelerator)
    engine.prepare(model, family)
    data = InMemoryData(
        directory=Path(),
        train_rows=len(rows),
        eval_rows=0,
        rejected_rows=0,
        leaked_rows=0,
        in_memory=rows,
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "stage")
        checkpoints = str(Path(folder, "checkpoints"))
        context = TrainContext(
            spec=spec,
            engine=engine,
            accelerator=accelerator,
            family=family,
            start=None,
            data=data,
            directory=directory,
            scratch=Path(folder, "scratch"),
            checkpoints=CheckpointStore(uri=checkpoints, fingerprint="benchmark"),
            trackers=TrackerFiles((), Path(folder, "logs"), str(Path(folder, "logs"))),
            publish=lambda _: None,
            check_lease=lambda: None,
            report_step=lambda _: None,
            report_validation=lambda _: None,
            answer_metrics=None,
        )
        trained, result = train(context, model)
        lines = (directory / "train" / "history.jsonl").read_text().splitlines()
    assert result is not None  # noqa: S101
    return result, trained, [json.loads(line) for line in lines]


def _measure_job(
    family: Ernie45VL, model: Any, spec: JobSpec, accelerator: Accelerator, rows: list[Row]
) -> dict[str, float]:
    """The train stage's speed; the first logging window is not counted."""
    result, _, history = train_stage(spec, accelerator, family, model, rows)
    windows = history[1:]
    return {
        **speed_of(result, windows),
        "passes_a_step": result.fit["gradient_accumulation_steps"] if result.fit else 1,
        "workers": spec.train.dataloader_num_workers,
    }


def speed_of(result: TrainResult, windows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Speed, memory and losses of a training, from its result and the counted lines of its
    history."""
    speeds = [window["tokens_per_second"] for window in windows]
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "tokens_a_step": round(result.tokens / result.steps),
        "data_wait_share": round(statistics.mean(w["data_wait_share"] for w in windows), 4),
        "peak_gib": round(result.peak_memory_bytes / GIB, 2),
        "first_loss": _rounded(result.first_loss),
        "last_loss": _rounded(result.final_loss),
    }


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 4)


def _speeds(measured: dict[str, dict[str, float]], spec: JobSpec) -> list[dict[str, object]]:
    """The train stage's speed, in the format that `job plan` reads."""
    if JOB not in measured:
        return []
    way = measured[JOB]
    return [
        {
            "what": f"{spec.train.per_device_train_batch_size} rows a step in "
            f"{way['passes_a_step']} passes, by the train stage",
            "trained": "lora",
            "compiled": spec.train.torch_compile,
            "tokens_a_pass": round(way["tokens_a_step"] / way["passes_a_step"]),
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

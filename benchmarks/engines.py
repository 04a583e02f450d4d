"""Measures both engines on the same checkpoints, rows and seed: speed, memory and losses.

    python -m benchmarks.engines                          on a GPU, a few minutes
    python -m benchmarks.engines --models dense --steps 20

The checkpoints have random weights: some layers of ERNIE-4.5-VL-28B-A3B, and a Qwen2.5-VL of about
a billion parameters. Each engine loads them in its own process and trains with the product's train
stage; the model trained with Unsloth is also exported and verified as in a job. The results under
`measured` belong into the table in `job.engines.choice`, by which `auto` selects.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record

HERE = Path(__file__).parent
SPEC = HERE.parent / "specs" / "latex.yaml"
WARM_UP = 3
"""Steps that are not counted, because compilation happens in them."""
ENGINES = ("transformers", "unsloth")
MODELS = ("ernie", "dense")
DENSE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
TOWER = {
    "depth": 8,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "fullatt_block_indexes": [3, 7],
    "window_size": 112,
}


def main() -> None:
    arguments = _arguments()
    if arguments.way is not None:
        return _train(arguments)
    if arguments.build is not None:
        return _build(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.place) as folder:
        found = {model: _measure(model, Path(folder), arguments) for model in arguments.models}
    _write(found, arguments)
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of ERNIE")
    parser.add_argument("--rows", type=int, default=32, help="rows per step")
    parser.add_argument(
        "--steps", type=int, default=12, help="number of steps; the first 3 are not counted"
    )
    parser.add_argument("--place", type=Path, help="folder for the checkpoints, some 20 GB")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder to write to")
    parser.add_argument("--also-compiled", action="store_true", help="train.torch_compile too")
    parser.add_argument("--small", action="store_true", help="tiny models, to try it on a CPU")
    # For the processes that this one starts.
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(model: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds the model's checkpoint, then trains it in each way, each in its own process."""
    checkpoint = folder / model
    _start(arguments, "--build", model, "--checkpoint", str(checkpoint))
    ways: dict[str, Any] = {}
    # ERNIE's step crashes when compiled by Unsloth.
    compiles = (False, True) if arguments.also_compiled and model == "dense" else (False,)
    for compiled, engine in itertools.product(compiles, ENGINES):
        name = f"{engine}, compiled" if compiled else engine
        out = folder / "found.json"
        more = ["--compiled"] if compiled else []
        ended = _start(
            arguments,
            *("--way", engine, "--model", model, "--checkpoint", str(checkpoint)),
            *("--out", str(out), *more),
            check=False,
        )
        ways[name] = json.loads(out.read_text()) if ended == 0 else {"failed_with": ended}
        out.unlink(missing_ok=True)
        print(model, name, json.dumps(ways[name]), flush=True)
    return {"ways": ways, **_compared(ways)}


def _start(arguments: argparse.Namespace, *more: str, check: bool = True) -> int:
    shared = ["--rows", str(arguments.rows), "--steps", str(arguments.steps)]
    shared += ["--layers", str(arguments.layers), *(["--small"] if arguments.small else [])]
    command = [sys.executable, "-m", "benchmarks.engines", *shared, *more]
    return subprocess.run(command, check=check).returncode  # noqa: S603 - this file


def _compared(ways: dict[str, Any]) -> dict[str, Any]:
    """Compares the losses of each way with those of the default engine."""
    plain = ways["transformers"].get("losses")
    differences = {
        name: max(abs(a - b) / abs(b) for a, b in zip(way["losses"], plain, strict=True))
        for name, way in ways.items()
        if plain and name != "transformers" and "losses" in way
    }
    return {"largest_relative_difference_of_losses": differences}


def _build(arguments: argparse.Namespace) -> None:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.checkpoint.mkdir(parents=True, exist_ok=True)
    if arguments.build == "dense":
        return _build_dense(arguments.checkpoint, device, small=arguments.small)
    from benchmarks.training import random_model, tiny_family

    family = tiny_family(_spec(arguments, "transformers", arguments.checkpoint))
    kind = "tiny" if arguments.small else "28b"
    model = random_model(kind, None if arguments.small else arguments.layers, family, device)
    model.save_pretrained(arguments.checkpoint)
    family.processor.save_pretrained(arguments.checkpoint)
    return None


def _build_dense(folder: Path, device: Any, *, small: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tests import models

    models.qwen_vl(folder)  # with its processor
    if small:
        return
    config = AutoConfig.from_pretrained(folder)
    for section, sizes in ((config.text_config, DENSE), (config.vision_config, TOWER)):
        for key, size in sizes.items():
            setattr(section, key, size)
    text = config.text_config
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    torch.manual_seed(0)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def _spec(arguments: argparse.Namespace, engine: str, checkpoint: Path) -> Any:
    from job.spec.load import load_spec

    settings = {
        "model.model_name_or_path": str(checkpoint),
        "model.engine": engine,
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "train.max_length": 2048,
        "train.per_device_train_batch_size": arguments.rows,
        "train.gradient_accumulation_steps": 1,
        "train.gradient_checkpointing": False,
        "train.torch_compile": arguments.compiled,
        "train.learning_rate": 1e-4,
        "train.max_steps": arguments.steps,
        "train.logging_steps": 1,
        "train.save_steps": 100 * arguments.steps,
        "train.optim": "adamw_torch",
        "train.fit": "off",
        "data.validation": None,
        "train.eval_strategy": "no",
        "train.eval_steps": None,
        "train.load_best_model_at_end": False,
        "train.dataloader_num_workers": 0 if arguments.small else 4,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_spec(SPEC.read_text(), str(SPEC), overrides, environ={}).spec


def _train(arguments: argparse.Namespace) -> None:
    """Trains with one engine on one checkpoint; for Unsloth, also exports the model."""
    with tempfile.TemporaryDirectory() as folder:
        if arguments.way == "unsloth":  # before Transformers is imported
            from job.engines import unsloth_patches

            unsloth_patches.import_unsloth(Path(folder), compiled=arguments.compiled)
        found = _trained(arguments, Path(folder))
    arguments.out.write_text(json.dumps(found))


def _trained(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.training import formula_rows, train_stage
    from job import engines, families
    from job.engines.device import detect
    from job.planning.sizes import GIB

    spec = _spec(arguments, arguments.way, arguments.checkpoint)
    accelerator = detect(spec.runtime)
    checkpoint = families.read_checkpoint(str(arguments.checkpoint), arguments.checkpoint)
    family = families.bind(checkpoint, spec.model, spec.data)
    engine = engines.create(spec.model, spec.lora, accelerator)
    started = time.monotonic()
    model = engine.load(family)
    loaded = time.monotonic() - started
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = list(formula_rows(arguments.steps * arguments.rows))
    result, trained, history = train_stage(spec, accelerator, family, model, rows)
    del model
    speeds = [step["tokens_per_second"] for step in history[WARM_UP:]]
    found = {
        "parameters": parameters,
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "tokens_a_step": round(result.tokens / result.steps),
        "peak_gib": round(result.peak_memory_bytes / GIB, 2),
        "load_seconds": round(loaded, 1),
        "train_seconds": round(result.seconds, 1),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        "losses": [step["loss"] for step in history],
        "device": accelerator.name,
        "family": family.name,
    }
    if arguments.way == "unsloth" and not arguments.compiled:
        handed_over = [trained]
        del trained
        found["export"] = _exported(spec, engine, family, rows, handed_over, folder)
    return found


def _exported(
    spec: Any, engine: Any, family: Any, rows: list[Any], trained: list[Any], folder: Path
) -> dict[str, Any]:
    """Exports and verifies the model in `trained`, as in a job, and releases it."""
    from job import families
    from job.engines.device import release_memory
    from job.export.export import export
    from job.export.export_context import ExportContext

    adapter = folder / "adapter"
    trained[0].save_pretrained(adapter)

    def bind_merged(directory: Path) -> Any:
        checkpoint = families.read_checkpoint(str(directory), directory)
        return families.bind(checkpoint, spec.model, spec.data)

    context = ExportContext(
        spec=spec,
        engine=engine,
        family=family,
        rows=rows,
        adapter=adapter,
        directory=folder,
        load_trained=trained.pop,
        load_base=lambda: engine.load(family),
        release=release_memory,
        bind_merged=bind_merged,
    )
    result = export(context).to_json()
    proof = ("tensors", "tensors_checked", "changed_tensors", "largest_change", "seconds")
    compared = ("adapter_reloaded", "merged_reloaded", "trained_against_base")
    return {key: result[key] for key in (*proof, *compared)}


def _write(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    every = [way for model in found.values() for way in model["ways"].values() if "losses" in way]
    device = every[0]["device"]
    measured = [
        {
            "family": pair[0]["family"],
            "compiled": compiled,
            "transformers": pair[0]["tokens_per_second"],
            "unsloth": pair[1]["tokens_per_second"],
        }
        for model in found.values()
        for compiled, pair in _pairs(model["ways"])
    ]
    headline = {}
    if measured:  # even if the other engine failed
        last = measured[-1]
        headline = {
            "tokens_per_second": last["unsloth"],
            "baseline_tokens_per_second": last["transformers"],
            "ratio": round(last["unsloth"] / last["transformers"], 2),
            "peak_gib": every[-1]["peak_gib"],
        }
    record.write(
        f"engines-{'-'.join(device.lower().split())}",
        "benchmarks.engines",
        device,
        {
            "rows_a_step": arguments.rows,
            "ernie_layers": arguments.layers,
            "measured": measured,
            **found,
            **headline,
        },
        ("torch", "transformers", "peft", "unsloth", "unsloth_zoo"),
        arguments.results,
    )


def _pairs(ways: dict[str, Any]) -> list[tuple[bool, tuple[Any, ...]]]:
    """Pairs of both engines' ways with the same `train.torch_compile`, if both succeeded."""
    pairs = []
    for compiled, end in ((False, ""), (True, ", compiled")):
        both = tuple(ways.get(f"{engine}{end}", {}) for engine in ENGINES)
        if all("losses" in way for way in both):
            pairs.append((compiled, both))
    return pairs


if __name__ == "__main__":
    main()

"""Writes, loads, trains, merges and exports the published architecture with random weights.

    python -m benchmarks.full_size                          the tiny model, on this CPU
    python -m benchmarks.full_size --model 28b --layers 12  as many layers as disk and memory hold

Every stage runs the product's own code, and is measured by time and by peak memory on the device
and on the host. The base is written in the published layout and loaded again; after two LoRA
steps, the merged weights are written in both layouts, one after the other. At 28 layers that takes
60 GB of disk.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.training import SPEC, UNVALIDATED, encoded_rows, random_model
from job import engines, families
from job.engines import cpu
from job.engines.device import detect, release_memory
from job.export.merge import Merge
from job.families import model_source
from job.families.base import Family
from job.families.batches import to_device
from job.families.weight_files import Weights
from job.planning.sizes import GIB
from job.spec.load import load_spec
from job.spec.types import JobSpec

LAYOUTS = ("vllm", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "28b"), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model's")
    parser.add_argument("--rows", type=int, default=4, help="rows per step")
    parser.add_argument("--experts", action="store_true", help="adapt the routed experts too")
    parser.add_argument("--place", type=Path, help="folder for the weights")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    accelerator = detect(load_spec(SPEC.read_text(), str(SPEC), environ={}).spec.runtime)
    stages: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.place) as folder:
        base = Path(folder, "base")
        with timed(stages, "write the base") as found:
            write_base(arguments.model, arguments.layers, accelerator.device, base)
        weights = found["gib"] = size(base)
        spec = adapted_spec(base, experts=arguments.experts)
        family = families.bind(families.read_checkpoint(str(base), base), spec.model, spec.data)
        engine = engines.create(spec.model, spec.lora, accelerator)
        with timed(stages, "load"):
            model: Any = engine.load(family)
        for shard in base.glob("*.safetensors"):
            shard.unlink()  # the exports need the space
        parameters = sum(parameter.numel() for parameter in model.parameters())
        layers = model.config.text_config.num_hidden_layers
        family.use_packed_step(model)
        targets = family.lora_targets(model, spec.lora)
        model = engine.attach_adapter(model, targets, spec.lora, spec.train.seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=accelerator.kind != "cpu")
        for name in ("first step", "second step"):
            with timed(stages, name) as found:
                found["loss"] = step(family, model, optimizer, arguments.rows, engine)
        del optimizer  # the export needs no optimizer state
        for layout in LAYOUTS:
            target = Path(folder, layout)
            with timed(stages, f"merge and export, {layout} layout") as found:
                merge = export(family, model, target, layout, spec)
            assert merge.changed, "two steps must change the adapted weights"  # noqa: S101
            found |= {"gib": size(target), "tensors": len(merge.digests)}
            shutil.rmtree(target)
    record.write(
        f"full-size-{arguments.model}-{accelerator.kind}",
        "benchmarks.full_size",
        accelerator.name or platform.machine(),
        {
            "layers": layers,
            "parameters": parameters,
            "weights_gib": weights,
            "trainable_parameters": sum(parameter.numel() for parameter in trained),
            "rows_a_step": arguments.rows,
            "stages": stages,
        },
        ("torch", "transformers", "peft", "safetensors"),
        arguments.results,
    )


@contextmanager
def timed(stages: dict[str, dict[str, float]], name: str) -> Iterator[dict[str, float]]:
    """Records the time and the peak memory of its block."""
    release_memory()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    reset = cpu.reset_peak_memory()
    found: dict[str, float] = {}
    started = time.monotonic()
    yield found
    if cuda:
        torch.cuda.synchronize()
    found["seconds"] = round(time.monotonic() - started, 3)
    if cuda:
        found["peak_device_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    if reset:
        found["peak_host_gib"] = round(cpu.peak_memory() / GIB, 2)
    stages[name] = found
    print(name, json.dumps(found), flush=True)


def write_base(name: str, layers: int | None, device: torch.device, directory: Path) -> None:
    """Random weights in bf16 on disk, in the published layout, with the tiny model's tokenizer."""
    spec = load_spec(SPEC.read_text(), str(SPEC), environ={}).spec
    tiny = families.read_checkpoint(
        "builtin://ernie-vl-tiny", model_source.MODELS / "ernie-vl-tiny"
    )
    model = random_model(name, layers, families.bind(tiny, spec.model, spec.data), device)
    family = families.bind(replace(tiny, config=model.config.to_dict()), spec.model, spec.data)

    def dtype(weight: str) -> torch.dtype:
        return torch.float32 if family.keeps_fp32(weight) else torch.bfloat16

    weights = Weights(
        meta_tensors=(
            (weight, torch.empty(value.shape, dtype=dtype(weight), device="meta"))
            for weight, value in model.named_parameters()
        ),
        tensors=(
            (weight, value.detach().to(dtype(weight)).cpu())
            for weight, value in model.named_parameters()
        ),
    )
    family.save(
        model, weights, directory, dtype=torch.bfloat16, max_shard_size="5GB", layout="vllm"
    )


def adapted_spec(base: Path, *, experts: bool) -> JobSpec:
    settings = [f"model.model_name_or_path={base}", "model.init=pretrained"]
    settings += ["lora.r=8", "lora.lora_alpha=16", f"lora.finetune_experts={str(experts).lower()}"]
    settings += UNVALIDATED
    return load_spec(SPEC.read_text(), str(SPEC), settings, environ={}).spec


def step(family: Family, model: Any, optimizer: Any, rows: int, engine: Any) -> float:
    """One packed step of the product: forward, backward and update."""
    batch = to_device(family.pack(encoded_rows(family, rows)), engine.device)
    with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.autocast):
        loss = model.train()(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return round(float(loss.detach()), 4)


def export(family: Family, model: Any, target: Path, layout: Any, spec: JobSpec) -> Merge:
    merge = Merge(model, dtype=torch.float16, keeps_fp32=family.keeps_fp32)
    family.save(
        model.get_base_model(),
        merge.weights(),
        target,
        dtype=torch.float16,
        max_shard_size=spec.export.merged.max_shard_size,
        layout=layout,
    )
    return merge


def size(directory: Path) -> float:
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return round(total / GIB, 3)


if __name__ == "__main__":
    main()

"""Writes, loads, trains and exports an architecture with random weights, and publishes the export.

    python -m benchmarks.full_size                    the tiny model, on this CPU
    python -m benchmarks.full_size --model small      0.6 B parameters, on this CPU
    python -m benchmarks.full_size --model 28b --base /dev/shm --place /tmp     on a GPU

Every part runs the product's own code, and is measured by time, by the process's CPU time, by the
bytes that it reads and writes, and by peak memory on the device and on the host. The base is
written in the published layout and loaded again; after two LoRA steps the export stage merges,
writes, uploads to a local folder and verifies the weights, as in a job. At 28 layers the base takes
55 GiB in `--base`, and the export 55 GiB in `--place`, which has its work folder and its output.
"""

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.training import (
    SPEC,
    UNVALIDATED,
    encoded_rows,
    formula_rows,
    random_model,
    random_weights,
)
from job import engines, families
from job.artifacts.output import Output
from job.artifacts.records import RunRecord
from job.distributed.cores import cores
from job.engines import cpu
from job.engines.device import detect, release_memory
from job.export.export import ExportResult
from job.export.export import export as export_stage
from job.export.export_context import ExportContext
from job.export.proof import PROBES
from job.families import model_source
from job.families.base import Family
from job.families.batches import to_device
from job.families.ernie45_vl import Ernie45VL
from job.families.weight_files import Weights
from job.planning.sizes import GIB
from job.spec.load import load_spec
from job.spec.types import JobSpec

SMALL = {
    "num_hidden_layers": 36,
    "mlp_layer_types": ["dense", *["sparse"] * 35],
    "hidden_size": 512,
    "moe_num_experts": 32,
    "moe_intermediate_size": [256, 256],
}
"""The tiny model's text model, but larger."""
DISK_FILES, DISK_BYTES = 4, 2**29
"""Files that are written at once to measure the disk, and bytes of each."""


def main() -> None:
    arguments = _arguments()
    accelerator = detect(load_spec(SPEC.read_text(), str(SPEC), environ={}).spec.runtime)
    stages: dict[str, dict[str, float]] = {}
    with (
        tempfile.TemporaryDirectory(dir=arguments.base or arguments.place) as base_folder,
        tempfile.TemporaryDirectory(dir=arguments.place) as place,
    ):
        base = Path(base_folder, "base")
        with timed(stages, "write the base") as found:
            write_base(arguments.model, arguments.layers, accelerator.device, base)
        weights = found["gib"] = size(base)
        with timed(stages, "write to the disk") as found:
            write_disk(Path(place))
        found["gib_per_second"] = round(DISK_FILES * DISK_BYTES / GIB / found["seconds"], 3)
        spec = adapted_spec(base, arguments)
        family = families.bind(families.read_checkpoint(str(base), base), spec.model, spec.data)
        engine = engines.create(spec.model, spec.lora, accelerator)
        with timed(stages, "load"):
            model: Any = engine.load(family)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        layers = model.config.text_config.num_hidden_layers
        family.use_packed_step(model)
        targets = family.lora_targets(model, spec.lora)
        model = engine.attach_adapter(model, targets, spec.lora, spec.train.seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trainable = sum(parameter.numel() for parameter in trained)
        optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=accelerator.kind != "cpu")
        for name in ("first step", "second step"):
            with timed(stages, name) as found:
                found["loss"] = step(family, model, optimizer, arguments.rows, engine)
        del optimizer, trained  # the export needs no optimizer state
        adapter = Path(place, "adapter")
        model.save_pretrained(adapter)
        models = [model.eval()]
        del model  # by the export, once it is written
        run = RunRecord(name="r", command="run", status="running", started="")
        output = Output(uri=f"{place}/output", workdir=Path(place, "work"), run=run)
        with timed(stages, "export") as found:
            result = export(spec, engine, family, adapter, models.pop, output)
        found |= {"gib": round(result.bytes / GIB, 3), "tensors": result.tensors}
        with timed(stages, "publish the export"):
            output.stages.publish("export", "f", "", result.seconds, result.to_json())
        output.release()
    facts = {
        "layers": layers,
        "parameters": parameters,
        "weights_gib": weights,
        "trainable_parameters": trainable,
        "layout": arguments.layout,
    }
    _record(arguments, accelerator.name or platform.machine(), stages, facts, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "small", "28b"), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than 28b has")
    parser.add_argument("--rows", type=int, default=4, help="rows per step")
    parser.add_argument("--experts", action="store_true", help="adapt the routed experts too")
    parser.add_argument("--layout", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--max-shard-size", help="of the export; the spec's unless given")
    parser.add_argument("--base", type=Path, help="folder for the base's weights")
    parser.add_argument("--place", type=Path, help="folder for everything else")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    return parser.parse_args()


def _record(
    arguments: argparse.Namespace,
    device: str,
    stages: dict[str, dict[str, float]],
    facts: dict[str, Any],
    result: ExportResult,
) -> None:
    kind = "cpu" if not torch.cuda.is_available() else "gpu"
    record.write(
        f"full-size-{arguments.model}-{kind}",
        "benchmarks.full_size",
        device,
        {
            **facts,
            "rows_a_step": arguments.rows,
            "cores": cores(),
            "stages": stages,
            "export_parts": result.took,
            "reloaded": result.merged_reloaded and result.merged_reloaded.to_json(),
        },
        ("torch", "transformers", "peft", "safetensors"),
        arguments.results,
    )


@contextmanager
def timed(stages: dict[str, dict[str, float]], name: str) -> Iterator[dict[str, float]]:
    """Records the time, the bytes and the peak memory of its block."""
    release_memory()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    reset = cpu.reset_peak_memory()
    found: dict[str, float] = {}
    started, used, moved = time.monotonic(), time.process_time(), io_bytes()
    yield found
    if cuda:
        torch.cuda.synchronize()
    found["seconds"] = round(time.monotonic() - started, 3)
    found["cpu_seconds"] = round(time.process_time() - used, 3)
    for which, count in io_bytes().items():
        found[f"{which}_gib"] = round((count - moved[which]) / GIB, 3)
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
    tiny_family = families.bind(tiny, spec.model, spec.data)
    if name == "small":
        config = json.loads(json.dumps(tiny.config))
        config["text_config"] |= SMALL
        skeleton = Ernie45VL.architecture(tiny.uri, config)
        model = random_weights(skeleton.config, tiny_family, device)
    else:
        model = random_model(name, layers, tiny_family, device)
    family = families.bind(replace(tiny, config=model.config.to_dict()), spec.model, spec.data)

    def dtype(weight: str) -> torch.dtype:
        return torch.float32 if family.keeps_fp32(weight) else torch.bfloat16

    weights = Weights.of(
        (weight, value.to(dtype(weight))) for weight, value in model.named_parameters()
    )
    family.save(
        model, weights, directory, dtype=torch.bfloat16, max_shard_size="5GB", layout="vllm"
    )


def write_disk(place: Path) -> None:
    """Writes incompressible bytes to a few files at once, and waits for the disk."""
    content = os.urandom(2**20)

    def write(number: int) -> None:
        path = place / f"disk-{number}"
        with path.open("wb") as file:
            for _ in range(DISK_BYTES // len(content)):
                file.write(content)
            os.fsync(file.fileno())
        path.unlink()

    with ThreadPoolExecutor(DISK_FILES) as pool:
        list(pool.map(write, range(DISK_FILES)))


def adapted_spec(base: Path, arguments: argparse.Namespace) -> JobSpec:
    settings = [f"model.model_name_or_path={base}", "model.init=pretrained"]
    settings += ["lora.r=8", "lora.lora_alpha=16"]
    settings += [f"lora.finetune_experts={str(arguments.experts).lower()}"]
    settings += [f"export.merged.layout={arguments.layout}"]
    if arguments.max_shard_size:
        settings += [f"export.merged.max_shard_size={arguments.max_shard_size}"]
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


def export(
    spec: JobSpec,
    engine: engines.Engine,
    family: Family,
    adapter: Path,
    load_trained: Callable[[], Any],
    output: Output,
) -> ExportResult:
    """The export stage, with eager uploads to a local output."""
    output.acquire()
    output.stages.invalidate("export")

    def bind(directory: Path) -> Family:
        checkpoint = families.read_checkpoint(str(directory), directory)
        return families.bind(checkpoint, spec.model, spec.data)

    def no_base() -> Any:
        raise AssertionError("the adapter has no biases, so that the trained model has the base")

    context = ExportContext(
        spec=spec,
        engine=engine,
        family=family,
        rows=list(formula_rows(PROBES)),
        adapter=adapter,
        directory=output.stages.local.create("export"),
        load_trained=load_trained,
        load_base=no_base,
        release=release_memory,
        bind_merged=bind,
        on_shard_written=functools.partial(output.stages.upload_eagerly, "export"),
        digest_tree=output.stages.digests.tree,
    )
    return export_stage(context)


def io_bytes() -> dict[str, int]:
    """The bytes that this process has read and written by system calls, not by memory maps."""
    text = Path("/proc/self/io").read_text()
    counts = dict(line.split(": ") for line in text.splitlines())
    return {"read": int(counts["rchar"]), "written": int(counts["wchar"])}


def size(directory: Path) -> float:
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return round(total / GIB, 3)


if __name__ == "__main__":
    main()

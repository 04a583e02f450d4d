"""Merges an adapter into a model of a gigabyte and prints the memory that takes beside it."""

import gc
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from job import engines, families
from job.engines import cpu
from job.engines.device import Accelerator
from job.export.merge import Merge
from job.spec.load import load_spec

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
# Large enough for what imports and buffers take to be little beside it, and in the proportions of
# the 28B model: a shard of a tenth of the weights, and no tensor above a fiftieth.
LAYERS = 36
ARCHITECTURE = {
    "num_hidden_layers": LAYERS,
    "mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)],
    "hidden_size": 512,
    "moe_num_experts": 16,
    "moe_intermediate_size": [256, 256],
}
SETTINGS = ["model.init=random", "model.dtype=bfloat16"]


def main(place: Path) -> None:
    shutil.copytree(TINY, place, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((place / "config.json").read_text())
    config["text_config"] |= ARCHITECTURE
    (place / "config.json").write_text(json.dumps(config))
    spec = load_spec(Path("specs/latex.yaml").read_text(), "latex.yaml", SETTINGS, {}).spec
    family = families.bind(families.read_checkpoint("place", place), spec.model, spec.data)
    device = Accelerator(kind="cpu", name="test", memory_bytes=2**34)
    engine = engines.create(spec.model, spec.lora, device)
    lora = replace(spec.lora, finetune_experts=True)  # the largest tensors
    base = engine.initialize(family, 1)
    model = engine.attach_adapter(base, family.lora_targets(base, lora), lora, 1).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.03)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
    gc.collect()
    assert cpu.reset_peak_memory()
    before = cpu.peak_memory()
    merge = Merge(model, dtype=torch.float16, keeps_fp32=family.keeps_fp32)
    family.save(
        model.get_base_model(),
        merge.weights(),
        place / "merged",
        dtype=torch.float16,
        max_shard_size=f"{weights // 11_000}KB",
        layout="vllm",
    )
    shards = len(list((place / "merged").glob("*.safetensors")))
    beside = cpu.peak_memory() - before
    print(json.dumps({"weights": weights, "beside": beside, "shards": shards}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

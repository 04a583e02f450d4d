"""Weights as safetensors files: written one shard at a time, and read by their headers alone."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size as the spec writes it: `5GB` is 5,000,000,000."""
    found = re.fullmatch(r"([0-9.]+)(KB|MB|GB|TB)", text)
    assert found, f"the schema lets no such size through: {text}"
    return int(float(found[1]) * _UNITS[found[2]])


def write(
    tensors: "Iterable[tuple[str, torch.Tensor]]", directory: Path, *, max_shard_size: str
) -> None:
    """Writes the tensors as they come, holding no more than one shard of them.

    `model.safetensors` where one file is enough, else `model-00001-of-0000N.safetensors` and the
    index, as Transformers names them. Tensors are stored where they are: contiguous, on the CPU.
    """
    limit = parse_size(max_shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    held = total_bytes = parameters = 0

    def close() -> None:
        from safetensors.torch import save_file

        shards.append(list(shard))
        save_file(shard, directory / _unnumbered(len(shards)), metadata={"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            close()
            held = 0
        shard[name] = tensor
        held += tensor.nbytes
        total_bytes += tensor.nbytes
        parameters += tensor.numel()
    close()

    if len(shards) == 1:
        (directory / _unnumbered(1)).rename(directory / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (directory / _unnumbered(number)).rename(directory / file)
        places |= dict.fromkeys(names, file)
    metadata = {"total_parameters": parameters, "total_size": total_bytes}
    index = json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True)
    (directory / INDEX).write_text(index + "\n")


def _unnumbered(number: int) -> str:
    """A shard's name until it is known how many there are."""
    return f"model-{number:05}.safetensors.part"

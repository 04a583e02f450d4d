"""Weights as safetensors files: written one shard at a time, and read by their headers alone."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import InputError

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


Shapes = dict[str, tuple[int, ...]]


def shapes(uri: str, directory: Path) -> Shapes:
    """Every tensor in the folder's safetensors files, by their headers alone.

    Raises InputError where there is none, or a file that the index names is missing or cut off.
    """
    from safetensors import SafetensorError, safe_open

    files = {path.name for path in directory.glob("*.safetensors")}
    index = directory / INDEX
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(named - files):
            raise InputError(
                uri,
                f"{len(missing)} of {len(named)} weight files are missing: {first(missing)}",
                fix="copy the checkpoint whole",
            )
        files = named
    if not files:
        raise InputError(
            uri,
            "holds no .safetensors weights",
            fix="name a checkpoint with weights, or start from random ones: model.init: random",
        )
    found: Shapes = {}
    for name in sorted(files):
        try:
            with safe_open(directory / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 - no mapping
                    found[tensor] = tuple(file.get_slice(tensor).get_shape())
        except SafetensorError as error:
            raise InputError(
                uri, f"its {name} cannot be read: {error}", fix="copy the file again"
            ) from error
    return found


def require(uri: str, found: Shapes, wanted: Shapes) -> None:
    """Raises one InputError that names what is missing, superfluous, or of another shape."""
    misshapen = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    wrong = {
        "are missing": [name for name in wanted if name not in found],
        "are not of this model": [name for name in found if name not in wanted],
        "have another shape": misshapen,
    }
    said = [f"{len(names)} {what}: {first(names)}" for what, names in wrong.items() if names]
    if said:
        raise InputError(
            uri,
            f"its tensors are not those of its config.json: {'; '.join(said)}",
            fix="check that the checkpoint was copied whole and belongs to its config.json",
        )


def first(names: Sequence[str], limit: int = 5) -> str:
    """The first few of them, for people."""
    return ", ".join(names[:limit]) + (" …" if len(names) > limit else "")


def _unnumbered(number: int) -> str:
    """A shard's name until it is known how many there are."""
    return f"model-{number:05}.safetensors.part"

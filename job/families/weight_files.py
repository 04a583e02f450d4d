"""Safetensors files: plans what goes into each, and inspects their headers.

`job.families.weight_writing` writes them.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from job.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

NamedTensor = tuple[str, "torch.Tensor"]
Conversion = Callable[[Iterable[NamedTensor]], Iterable[NamedTensor]]


def _unchanged(tensors: Iterable[NamedTensor]) -> Iterable[NamedTensor]:
    return tensors


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a checkpoint to write: all shapes up front, and values computed one by one.

    Values can be asked for in any order, once.
    """

    meta_tensors: Mapping[str, "torch.Tensor"]
    """Shapes and dtypes of the model's tensors, by name, in the model's order."""
    tensors: Callable[[Iterable[str]], Iterable[NamedTensor]]
    """The values of the named tensors, in that order, on any device. Each is computed when the
    iterator reaches it, and only then is the next name taken. May raise after the last one."""
    convert: Conversion = _unchanged
    """From the model's names and shapes to those in files; tensor by tensor where possible."""

    @classmethod
    def of(cls, tensors: Iterable[NamedTensor]) -> Self:
        """From tensors in memory."""
        in_memory = {name: tensor.detach() for name, tensor in tensors}
        return cls(
            meta_tensors={name: tensor.to("meta") for name, tensor in in_memory.items()},
            tensors=lambda names: ((name, in_memory[name]) for name in names),
        )

    def converted(self, convert: Conversion) -> Self:
        """The weights with names and shapes converted, after any other conversion."""
        first = self.convert
        return replace(self, convert=lambda tensors: convert(first(tensors)))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of a checkpoint, planned before its tensors are computed."""

    file: str
    meta_tensors: Mapping[str, "torch.Tensor"]
    """By name, in the order of the conversion."""


def parse_size(text: str) -> int:
    """The bytes of a size in the spec: `5GB` is 5,000,000,000."""
    match = re.fullmatch(r"([0-9.]+)(KB|MB|GB|TB)", text)
    assert match, f"the schema rejects such a size: {text}"
    return int(float(match[1]) * _UNITS[match[2]])


def plan(meta_tensors: Iterable[NamedTensor], max_shard_size: str) -> tuple[Shard, ...]:
    """Assigns each tensor to a file, before anything is written.

    One file is named `model.safetensors`, several `model-00001-of-0000N.safetensors`; names and
    contents are the same as Transformers'.
    """
    limit, size = parse_size(max_shard_size), 0
    groups: list[dict[str, torch.Tensor]] = [{}]
    for name, meta_tensor in meta_tensors:
        if groups[-1] and size + meta_tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = meta_tensor.to("meta")
        size += meta_tensor.nbytes
    if len(groups) == 1:
        return (Shard(file="model.safetensors", meta_tensors=groups[0]),)
    return tuple(
        Shard(file=f"model-{number:05}-of-{len(groups):05}.safetensors", meta_tensors=group)
        for number, group in enumerate(groups, start=1)
    )


def raw(tensor: "torch.Tensor") -> memoryview:
    """A tensor's bytes, as in a file."""
    import torch

    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


Shapes = dict[str, tuple[int, ...]]


def checkpoint_files(uri: str, directory: Path) -> list[Path]:
    """The folder's safetensors files: those of its index, or all if it has none.

    Raises InputError if there is none, or if a file of the index is missing.
    """
    files = {path.name for path in directory.glob("*.safetensors")}
    index = directory / INDEX
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(named - files):
            raise InputError(
                uri,
                f"{len(missing)} of {len(named)} weight files are missing: {shortened(missing)}",
                fix="copy the checkpoint whole",
            )
        files = named
    if not files:
        raise InputError(
            uri,
            "holds no .safetensors weights",
            fix="use a checkpoint with weights, or random ones: model.init: random",
        )
    return [directory / name for name in sorted(files)]


def shapes(uri: str, directory: Path) -> Shapes:
    """The shapes of all tensors in the folder's safetensors files, from their headers.

    Raises InputError if there is none, or if a file of the index is missing or truncated.
    """
    stored: Shapes = {}
    for path in checkpoint_files(uri, directory):
        stored |= file_shapes(uri, path)
    return stored


def file_shapes(uri: str, path: Path) -> Shapes:
    """The shapes of a file's tensors, from its header. Raises InputError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 - no mapping
            }
    except SafetensorError as error:
        raise InputError(
            uri, f"its {path.name} cannot be read: {error}", fix="copy the file again"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How stored tensors differ from those that a model needs, by name."""

    missing: list[str]
    unknown: list[str]
    misshapen: list[str]
    """With both shapes."""

    @classmethod
    def between(cls, stored: Shapes, expected: Shapes, prefix: str = "") -> Self:
        """Names are given without the prefix that all of them share."""
        return cls(
            missing=[name.removeprefix(prefix) for name in expected if name not in stored],
            unknown=[name.removeprefix(prefix) for name in stored if name not in expected],
            misshapen=[
                f"{name.removeprefix(prefix)} is {list(stored[name])} instead of {list(shape)}"
                for name, shape in expected.items()
                if name in stored and stored[name] != shape
            ],
        )

    def problems(self, *, unknown: str, misshapen: str) -> list[str]:
        """A phrase for each kind of difference that there is."""
        found = {"are missing": self.missing, unknown: self.unknown, misshapen: self.misshapen}
        return [
            f"{len(names)} {what}: {shortened(names)}" for what, names in found.items() if names
        ]


def require(uri: str, stored: Shapes, expected: Shapes) -> None:
    """Raises one InputError for all tensors that are missing, unexpected, or of another shape."""
    problems = Differences.between(stored, expected).problems(
        unknown="are not of this model", misshapen="have another shape"
    )
    if problems:
        raise InputError(
            uri,
            f"its tensors are not those of its config.json: {'; '.join(problems)}",
            fix="check that the checkpoint was copied whole and belongs to its config.json",
        )


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, for error messages."""
    return ", ".join(names[:limit]) + (" …" if len(names) > limit else "")

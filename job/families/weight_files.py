"""Safetensors files: writes them tensor by tensor, and inspects their headers."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from job.errors import InputError
from job.storage.background import BackgroundTasks

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_METADATA = {"format": "pt"}
_WRITE_QUEUE = 2
"""Tensors queued for the disk while the next one is computed."""

NamedTensor = tuple[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a checkpoint to write: all shapes up front, and values computed one by one.

    Both have the same names in the same order, and can be iterated once.
    """

    meta_tensors: Iterable[NamedTensor]
    """Shapes and dtypes, on the meta device."""
    tensors: Iterable[NamedTensor]
    """Values, on the CPU; each is computed when the iterator reaches it."""

    @classmethod
    def of(cls, tensors: Iterable[NamedTensor]) -> Self:
        """From tensors in memory."""
        in_memory = list(tensors)
        return cls(
            meta_tensors=((name, tensor.detach().to("meta")) for name, tensor in in_memory),
            tensors=((name, tensor.detach().cpu()) for name, tensor in in_memory),
        )

    def converted(
        self, convert: Callable[[Iterable[NamedTensor]], Iterable[NamedTensor]]
    ) -> "Weights":
        """The weights with names and shapes converted."""
        return Weights(meta_tensors=convert(self.meta_tensors), tensors=convert(self.tensors))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of a checkpoint, planned before its tensors are computed."""

    file: str
    meta_tensors: Mapping[str, "torch.Tensor"]
    """By name, in the order of `Weights.tensors`."""


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


def write(
    weights: Weights,
    directory: Path,
    *,
    max_shard_size: str,
    finished: Callable[[Path], None] | None = None,
) -> None:
    """Writes each tensor at its offset in its file, and an index if there are several shards.

    `finished` is called with each complete shard, before the next one is written. It is not called
    for a single file, which could be mistaken for a complete checkpoint.
    """
    shards = plan(weights.meta_tensors, max_shard_size)
    tensors = iter(weights.tensors)
    directory.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        _write_shard(shard, tensors, directory)
        if finished is not None and len(shards) > 1:
            finished(directory / shard.file)
    # Exhausts the iterator, which may raise after its last tensor.
    extra = next(tensors, None)
    assert extra is None, f"not among the meta_tensors: {extra and extra[0]}"
    if len(shards) > 1:
        _write_index(shards, directory)


def raw(tensor: "torch.Tensor") -> memoryview:
    """A tensor's bytes, as in a file."""
    import torch

    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_shard(shard: Shard, tensors: "Iterator[NamedTensor]", directory: Path) -> None:
    """Tensors may come in another order than they have in the file."""
    header, starts = _header(shard.meta_tensors)

    def put(file: BinaryIO, start: int, tensor: "torch.Tensor") -> None:
        file.seek(start)
        file.write(raw(tensor))

    with (
        (directory / shard.file).open("wb") as file,
        BackgroundTasks("write", max_pending=_WRITE_QUEUE) as writes,
    ):
        file.write(header)
        for name, meta_tensor in shard.meta_tensors.items():
            actual, tensor = next(tensors)
            expected = (name, meta_tensor.shape, meta_tensor.dtype)
            assert (actual, tensor.shape, tensor.dtype) == expected, f"{actual} is not {expected}"
            writes.submit(partial(put, file, starts[name], tensor))
            del tensor  # it may be large; the writer frees it


def _header(meta_tensors: "Mapping[str, torch.Tensor]") -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and each tensor's offset in the file.

    The library determines the order of tensors and the names of dtypes: it saves empty tensors of
    the same names, and only shapes and offsets are changed.
    """
    import torch
    from safetensors.torch import save

    empty = {name: torch.empty(0, dtype=each.dtype) for name, each in meta_tensors.items()}
    saved = save(empty, metadata=_METADATA)
    entries = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])
    starts, offset = dict[str, int](), 0
    for name, entry in entries.items():
        if name in meta_tensors:
            end = offset + meta_tensors[name].nbytes
            entry |= {"shape": list(meta_tensors[name].shape), "data_offsets": [offset, end]}
            starts[name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def _write_index(shards: Sequence[Shard], directory: Path) -> None:
    meta_tensors = [meta_tensor for shard in shards for meta_tensor in shard.meta_tensors.values()]
    metadata = {
        "total_parameters": sum(meta_tensor.numel() for meta_tensor in meta_tensors),
        "total_size": sum(meta_tensor.nbytes for meta_tensor in meta_tensors),
    }
    files = {name: shard.file for shard in shards for name in shard.meta_tensors}
    index = json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True)
    (directory / INDEX).write_text(index + "\n")


Shapes = dict[str, tuple[int, ...]]


def shapes(uri: str, directory: Path) -> Shapes:
    """The shapes of all tensors in the folder's safetensors files, from their headers.

    Raises InputError if there is none, or if a file of the index is missing or truncated.
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
    stored: Shapes = {}
    for name in sorted(files):
        stored |= file_shapes(uri, directory / name)
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

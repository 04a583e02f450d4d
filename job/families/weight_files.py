"""Weights as safetensors files: written tensor by tensor, and read by their headers alone."""

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
_WAITING = 2
"""Tensors that are held for the disk while the next one is made."""

Named = tuple[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a checkpoint to be written: what each will be like, then each itself.

    Both come by the same names in the same order, once.
    """

    outlines: Iterable[Named]
    """Shapes and dtypes without values, on the meta device."""
    tensors: Iterable[Named]
    """On the CPU, each made when it is asked for."""

    @classmethod
    def of(cls, tensors: Iterable[Named]) -> Self:
        """Those that are in memory."""
        held = list(tensors)
        return cls(
            outlines=((name, tensor.detach().to("meta")) for name, tensor in held),
            tensors=((name, tensor.detach().cpu()) for name, tensor in held),
        )

    def through(self, change: Callable[[Iterable[Named]], Iterable[Named]]) -> "Weights":
        """What becomes of them by a change of names and shapes."""
        return Weights(outlines=change(self.outlines), tensors=change(self.tensors))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of a checkpoint, known before any of its tensors is made."""

    file: str
    outlines: Mapping[str, "torch.Tensor"]
    """In the order in which the tensors come."""


def parse_size(text: str) -> int:
    """Bytes of a size as the spec writes it: `5GB` is 5,000,000,000."""
    found = re.fullmatch(r"([0-9.]+)(KB|MB|GB|TB)", text)
    assert found, f"the schema lets no such size through: {text}"
    return int(float(found[1]) * _UNITS[found[2]])


def plan(outlines: Iterable[Named], max_shard_size: str) -> tuple[Shard, ...]:
    """Which file each tensor goes to, so that every file has its final name from the start.

    `model.safetensors` where one is enough, else `model-00001-of-0000N.safetensors`, as
    Transformers names and fills them.
    """
    limit, held = parse_size(max_shard_size), 0
    groups: list[dict[str, torch.Tensor]] = [{}]
    for name, outline in outlines:
        if groups[-1] and held + outline.nbytes > limit:
            groups.append({})
            held = 0
        groups[-1][name] = outline.to("meta")
        held += outline.nbytes
    if len(groups) == 1:
        return (Shard(file="model.safetensors", outlines=groups[0]),)
    return tuple(
        Shard(file=f"model-{number:05}-of-{len(groups):05}.safetensors", outlines=group)
        for number, group in enumerate(groups, start=1)
    )


def write(
    weights: Weights,
    directory: Path,
    *,
    max_shard_size: str,
    finished: Callable[[Path], None] | None = None,
) -> None:
    """Writes the tensors as they come, each to its place in its file; then the index, if any.

    `finished` is told of each of several shards when it is whole, and the next one is made while
    that is made use of. Not of a single file: whoever finds that may take it for a checkpoint.
    """
    shards = plan(weights.outlines, max_shard_size)
    tensors = iter(weights.tensors)
    directory.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        _write_shard(shard, tensors, directory)
        if finished is not None and len(shards) > 1:
            finished(directory / shard.file)
    # Who makes them may have something to say at their end.
    left = next(tensors, None)
    assert left is None, f"not among the outlines: {left and left[0]}"
    if len(shards) > 1:
        _write_index(shards, directory)


def raw(tensor: "torch.Tensor") -> memoryview:
    """A tensor's bytes, as files hold them."""
    import torch

    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_shard(shard: Shard, tensors: "Iterator[Named]", directory: Path) -> None:
    """Tensors wait for nothing but a place: they need not lie in the file as they come."""
    header, starts = _header(shard.outlines)

    def put(file: BinaryIO, start: int, tensor: "torch.Tensor") -> None:
        file.seek(start)
        file.write(raw(tensor))

    with (
        (directory / shard.file).open("wb") as file,
        BackgroundTasks("write", max_pending=_WAITING) as writes,
    ):
        file.write(header)
        for name, outline in shard.outlines.items():
            found, tensor = next(tensors)
            expected = (name, outline.shape, outline.dtype)
            assert (found, tensor.shape, tensor.dtype) == expected, f"{found} is not {expected}"
            writes.submit(partial(put, file, starts[name], tensor))
            del tensor  # it may be large, and belongs to who writes it


def _header(outlines: "Mapping[str, torch.Tensor]") -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where in the file each tensor begins.

    The library says in which order tensors lie, and what it calls their dtypes, when it saves
    tensors of no size under the same names.
    """
    import torch
    from safetensors.torch import save

    empty = {name: torch.empty(0, dtype=each.dtype) for name, each in outlines.items()}
    saved = save(empty, metadata=_METADATA)
    entries = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])
    starts, offset = dict[str, int](), 0
    for name, entry in entries.items():
        if name in outlines:
            end = offset + outlines[name].nbytes
            entry |= {"shape": list(outlines[name].shape), "data_offsets": [offset, end]}
            starts[name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def _write_index(shards: Sequence[Shard], directory: Path) -> None:
    outlines = [outline for shard in shards for outline in shard.outlines.values()]
    metadata = {
        "total_parameters": sum(outline.numel() for outline in outlines),
        "total_size": sum(outline.nbytes for outline in outlines),
    }
    places = {name: shard.file for shard in shards for name in shard.outlines}
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

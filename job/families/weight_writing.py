"""Writes weight files: several at once, while the next tensors are computed.

The file system lets one thread at a time write to a file, at a few GB/s at most. So the shards are
divided among a few lanes, each with a thread of its own, and the next tensor to be computed is one
of the lane that has the least left to write.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from job.families.host_pieces import HostPieces
from job.families.weight_files import INDEX, NamedTensor, Shard, Weights, plan
from job.storage.background import BackgroundTasks

if TYPE_CHECKING:
    import torch

LANES = 4
"""Shards written at the same time; fewer on a machine with fewer cores."""
QUEUED_BYTES = 2**29
"""Bytes of tensors that wait for each lane in the memory of a GPU, which computes them faster than
any disk takes them; a larger tensor waits alone."""
QUEUED_ON_CPU = 2**24
"""The same in the memory of the host, which has to suffice for little beside the model."""
_METADATA = {"format": "pt"}


def write(
    weights: Weights,
    directory: Path,
    *,
    max_shard_size: str,
    finished: Callable[[Path], None] | None = None,
) -> None:
    """Writes each tensor at its offset in its file, and an index if there are several shards.

    `finished` is called with each complete shard while others are written, one call at a time, on
    the thread that wrote it. It is not called for a single file, which could be mistaken for a
    complete checkpoint. The first error of any thread is raised, once all have stopped.
    """
    planned = _Plan.of(weights, max_shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as lanes:
        writing = _Writing(planned, directory, finished, lanes)
        for name, tensor in weights.convert(weights.tensors(writing.order())):
            writing.submit(name, tensor)
            del tensor  # it may be large; its lane frees it
        writing.finish()
    if len(planned.shards) > 1:
        _write_index(planned.shards, directory)


class _Plan:
    """The files, and from which of the model's tensors each is computed."""

    def __init__(self, shards: Sequence[Shard], sources: Sequence[Sequence[str]]) -> None:
        self.shards = shards
        self.sources = sources
        """By shard: the model's tensors that most of it is computed from, in the model's order."""

    @classmethod
    def of(cls, weights: Weights, max_shard_size: str) -> "_Plan":
        read = list[str]()  # the model's tensors that the conversion has taken
        source = dict[str, int]()

        def taken() -> Iterator[NamedTensor]:
            for name, meta_tensor in weights.meta_tensors.items():
                read.append(name)
                yield name, meta_tensor

        def converted() -> Iterator[NamedTensor]:
            for name, meta_tensor in weights.convert(taken()):
                source[name] = len(read) - 1
                yield name, meta_tensor

        shards = plan(converted(), max_shard_size)
        # What yields no tensor of its own, such as the first half of a pair, goes with the next.
        sources, start = list[list[str]](), 0
        for shard in shards:
            last = max((source[name] for name in shard.meta_tensors), default=-1)
            end = len(read) if shard is shards[-1] else max(start, last + 1)
            sources.append(read[start:end])
            start = end
        return cls(shards, sources)


class _Writing:
    """The files being written, by the lanes of `stack`."""

    def __init__(
        self,
        planned: _Plan,
        directory: Path,
        finished: Callable[[Path], None] | None,
        stack: ExitStack,
    ) -> None:
        self._sources = planned.sources
        self._finished = finished if len(planned.shards) > 1 else None
        self._finishing = threading.Lock()
        count = min(LANES, len(planned.shards), len(os.sched_getaffinity(0)))
        self._files = [_File(shard, directory / shard.file) for shard in planned.shards]
        for file in self._files:
            stack.callback(file.close)  # after the lanes have stopped
        self._lanes = [
            stack.enter_context(BackgroundTasks("write", max_size=QUEUED_BYTES))
            for _ in range(count)
        ]
        self._pieces = [HostPieces() for _ in range(count)]
        self._shard_of = {
            name: number
            for number, shard in enumerate(planned.shards)
            for name in shard.meta_tensors
        }

    def order(self) -> Iterator[str]:
        """The model's tensors, each time the next one of the lane with the least to write."""
        count = len(self._lanes)
        left = [
            [name for sources in self._sources[lane::count] for name in sources][::-1]
            for lane in range(count)
        ]
        while waiting := [lane for lane in range(count) if left[lane]]:
            sizes = {lane: tasks.size for lane, tasks in enumerate(self._lanes)}
            yield left[min(waiting, key=sizes.__getitem__)].pop()

    def submit(self, name: str, tensor: "torch.Tensor") -> None:
        """Queues a tensor for its file. Raises the error of an earlier one."""
        assert name in self._shard_of, f"not among the meta_tensors: {name}"
        shard = self._shard_of.pop(name)
        file, lane = self._files[shard], shard % len(self._lanes)
        file.require_as_planned(name, tensor)
        weight = QUEUED_BYTES // QUEUED_ON_CPU if tensor.device.type == "cpu" else 1
        task = partial(self._put, file, lane, name, tensor)
        self._lanes[lane].submit(task, tensor.nbytes * weight)
        if not file.missing:
            self._lanes[lane].submit(partial(self._finish, file))

    def finish(self) -> None:
        """Waits until everything is written."""
        assert not self._shard_of, f"no value for {sorted(self._shard_of)[:3]}"
        for lane in self._lanes:
            lane.finish()

    def _put(self, file: "_File", lane: int, name: str, tensor: "torch.Tensor") -> None:
        file.put(name, self._pieces[lane].of(tensor))

    def _finish(self, file: "_File") -> None:
        file.close()
        if self._finished is not None:
            with self._finishing:
                self._finished(file.path)


class _File:
    """A shard's file. Tensors may come in another order than they have in it."""

    def __init__(self, shard: Shard, path: Path) -> None:
        self.path = path
        self.missing = dict(shard.meta_tensors)
        """The tensors that are still to come."""
        self._header, self._starts = _header(shard.meta_tensors)
        self._descriptor: int | None = None
        if not self.missing:  # a checkpoint without tensors
            self._open()

    def require_as_planned(self, name: str, tensor: "torch.Tensor") -> None:
        meta_tensor = self.missing.pop(name)
        expected = (meta_tensor.shape, meta_tensor.dtype)
        assert (tensor.shape, tensor.dtype) == expected, f"{name} is not {expected}"

    def put(self, name: str, pieces: Iterator[memoryview]) -> None:
        """Writes a tensor's bytes; the file and its header too if it is the first one."""
        descriptor = self._open() if self._descriptor is None else self._descriptor
        offset = self._starts[name]
        for piece in pieces:
            _write_at(descriptor, piece, offset)
            offset += len(piece)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o666)
        _write_at(self._descriptor, memoryview(self._header), 0)
        return self._descriptor


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of the bytes; a system call may write fewer."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


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

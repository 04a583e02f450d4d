"""Weight files: planned before any tensor is computed, byte for byte as safetensors writes them."""

import errno
import json
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.families import weight_files, weight_writing
from job.families.weight_files import NamedTensor, Weights

# Of every kind: dtypes that lie apart in a file, no size, no dimension, a name beyond ASCII.
TENSORS: dict[str, torch.Tensor] = {
    "model.embed": torch.randn(40, 8).half(),
    "model.norm": torch.randn(40),
    "model.2.weight": torch.randn(30, 10).half(),
    "model.10.weight": torch.randn(30, 10).half(),
    "model.10.scale": torch.tensor(2.5, dtype=torch.float16),
    "model.10.none": torch.empty(0, 4),
    "model.counts": torch.arange(7),
    "model.ünï": torch.randn(3).bfloat16(),
    "head": torch.randn(8, 40).half(),
}
SIZES = ("0.1KB", "0.7KB", "1.2KB", "2KB", "1GB")


def as_safetensors_writes(directory: Path, max_shard_size: str) -> None:
    """The same files by the library, which holds a shard for it."""
    directory.mkdir()
    groups, held = [dict[str, torch.Tensor]()], 0
    for name, tensor in TENSORS.items():
        if groups[-1] and held + tensor.nbytes > weight_files.parse_size(max_shard_size):
            groups.append({})
            held = 0
        groups[-1][name] = tensor
        held += tensor.nbytes
    for number, group in enumerate(groups, start=1):
        several = f"model-{number:05}-of-{len(groups):05}.safetensors"
        file = several if len(groups) > 1 else "model.safetensors"
        save_file(group, directory / file, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_size", SIZES)
def test_files_are_byte_by_byte_those_of_safetensors(max_shard_size: str, tmp_path: Path) -> None:
    as_safetensors_writes(tmp_path / "expected", max_shard_size)
    weight_writing.write(
        Weights.of(TENSORS.items()), tmp_path / "found", max_shard_size=max_shard_size
    )
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()}
    index = found.pop(weight_files.INDEX, None)
    assert found == expected
    assert (index is not None) is (len(expected) > 1)
    if index is not None:
        told = json.loads(index)
        assert told["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        assert told["metadata"]["total_parameters"] == sum(t.numel() for t in TENSORS.values())
        assert told["weight_map"].keys() == TENSORS.keys()


def test_shards_are_told_of_one_at_a_time_once_they_are_whole(tmp_path: Path) -> None:
    """On the threads that write, while other shards are written."""
    whole, telling = list[str](), threading.Lock()

    def finished(path: Path) -> None:
        assert telling.acquire(blocking=False), "another is being told of"
        whole.append(path.name)
        (tmp_path / "copies").mkdir(exist_ok=True)
        (tmp_path / "copies" / path.name).write_bytes(path.read_bytes())
        telling.release()

    weights = Weights.of(TENSORS.items())
    weight_writing.write(weights, tmp_path / "all", max_shard_size="0.7KB", finished=finished)
    count = len(whole)
    assert count > 2
    assert sorted(whole) == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for name in whole:
        assert (tmp_path / "copies" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_the_next_tensor_is_of_the_lane_that_has_the_least_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lanes, the first of which does not write before the second has written all of its own."""
    monkeypatch.setattr(weight_writing, "LANES", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    held = {f"{number}": torch.randn(100) for number in range(8)}
    shards = weight_files.plan(Weights.of(held.items()).meta_tensors.items(), "0.8KB")
    assert [list(shard.meta_tensors) for shard in shards] == [
        ["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]
    ]  # fmt: skip
    gate, taken = threading.Event(), list[str]()
    put = weight_writing._File.put

    def slowly(file: weight_writing._File, name: str, pieces: Iterator[memoryview]) -> None:
        if name == "0":
            assert gate.wait(10)
        put(file, name, pieces)

    def values(names: Iterable[str]) -> Iterator[NamedTensor]:
        for name in names:
            taken.append(name)
            if len(taken) == len(held):
                gate.set()
            yield name, held[name]

    monkeypatch.setattr(weight_writing._File, "put", slowly)
    weights = replace(Weights.of(held.items()), tensors=values)
    weight_writing.write(weights, tmp_path, max_shard_size="0.8KB")
    assert taken[:2] == ["0", "2"]
    assert sorted(taken) == sorted(held)
    assert load_file(tmp_path / shards[0].file)["0"].equal(held["0"])


@pytest.mark.parametrize("where", ["value", "disk", "finished"])
def test_an_error_of_any_thread_ends_the_writing_and_leaves_no_index(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def values(names: Iterable[str]) -> Iterator[NamedTensor]:
        for number, name in enumerate(names):
            if number == 4 and where == "value":
                failing()
            yield name, TENSORS[name]

    if where == "disk":
        monkeypatch.setattr(os, "pwrite", failing)
    weights, before = replace(Weights.of(TENSORS.items()), tensors=values), threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        weight_writing.write(
            weights,
            tmp_path,
            max_shard_size="0.7KB",
            finished=failing if where == "finished" else None,
        )
    assert not (tmp_path / weight_files.INDEX).exists()
    assert threading.active_count() == before
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in read(link)]


def read(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # the one of the listing itself
        return ""


def test_a_write_that_the_system_cuts_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, bytes(data[:100]), at))
    weight_writing.write(Weights.of(TENSORS.items()), tmp_path / "short", max_shard_size="1GB")
    monkeypatch.undo()
    weight_writing.write(Weights.of(TENSORS.items()), tmp_path / "whole", max_shard_size="1GB")
    name = "model.safetensors"
    assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_single_file_is_not_told_of(tmp_path: Path) -> None:
    def finished(path: Path) -> None:
        raise AssertionError(path)

    weight_writing.write(
        Weights.of(TENSORS.items()), tmp_path, max_shard_size="1GB", finished=finished
    )
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("wrong", ["name", "shape", "dtype", "fewer", "more"])
def test_what_is_not_as_it_was_planned_is_a_defect(wrong: str, tmp_path: Path) -> None:
    tensors = list(TENSORS.items())
    name, tensor = tensors[2]
    match wrong:
        case "name":
            tensors[2] = ("other", tensor)
        case "shape":
            tensors[2] = (name, tensor.T.contiguous())
        case "dtype":
            tensors[2] = (name, tensor.float())
        case "fewer":
            del tensors[-1]
        case "more":
            tensors.append(("other", tensor))
    weights = replace(Weights.of(TENSORS.items()), tensors=lambda _: iter(tensors))
    with pytest.raises(AssertionError):
        weight_writing.write(weights, tmp_path, max_shard_size="1KB")

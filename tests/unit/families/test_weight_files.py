"""Weight files: planned before any tensor is computed, byte for byte as safetensors writes them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from job.families import weight_files
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
    weight_files.write(
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


def test_a_shard_is_told_of_under_its_final_name_before_the_next_one_is_made(
    tmp_path: Path,
) -> None:
    made, whole = list[str](), list[str]()

    def finished(path: Path) -> None:
        number = len(whole)
        whole.append(path.name)
        held = weight_files.plan(Weights.of(TENSORS.items()).meta_tensors, "0.7KB")[: number + 1]
        assert made == [name for shard in held for name in shard.meta_tensors]
        (tmp_path / "copies").mkdir(exist_ok=True)
        (tmp_path / "copies" / path.name).write_bytes(path.read_bytes())

    def tensors() -> Iterator[NamedTensor]:
        for name, tensor in TENSORS.items():
            made.append(name)
            yield name, tensor

    weights = Weights(meta_tensors=Weights.of(TENSORS.items()).meta_tensors, tensors=tensors())
    weight_files.write(weights, tmp_path / "all", max_shard_size="0.7KB", finished=finished)
    count = len(whole)
    assert count > 2
    assert whole == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for name in whole:
        assert (tmp_path / "copies" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_a_single_file_is_not_told_of(tmp_path: Path) -> None:
    def finished(path: Path) -> None:
        raise AssertionError(path)

    weight_files.write(
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
    weights = Weights(meta_tensors=Weights.of(TENSORS.items()).meta_tensors, tensors=iter(tensors))
    with pytest.raises((AssertionError, StopIteration)):
        weight_files.write(weights, tmp_path, max_shard_size="1KB")

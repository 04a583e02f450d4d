"""Weights that are written from a GPU's memory, and the checksums that it computes."""

from pathlib import Path

import pytest
import torch

from job.export.tensor_digests import CHUNK_WORDS, TensorDigests, checksum
from job.families import weight_writing
from job.families.host_pieces import PIECE, HostPieces
from job.families.weight_files import Weights, raw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("size", [0, 5, PIECE, 3 * PIECE + 7])
def test_pieces_are_the_bytes_of_the_tensor(size: int) -> None:
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    pieces = HostPieces()
    for _ in range(2):  # the second time in the same buffers
        assert b"".join(bytes(piece) for piece in pieces.of(tensor)) == bytes(raw(tensor))


def test_files_are_the_same_from_either_memory(tmp_path: Path) -> None:
    held = {
        f"layer.{number}": torch.randn(size, device="cuda").to(dtype)
        for number, (size, dtype) in enumerate(
            (size, dtype)
            for size in (3, 1000, PIECE // 2 + 11)
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
        )
    }
    on_host = {name: tensor.cpu() for name, tensor in held.items()}
    for folder, tensors in (("gpu", held), ("cpu", on_host)):
        weights = Weights.of(tensors.items())
        weight_writing.write(weights, tmp_path / folder, max_shard_size="50MB")
    files = sorted(path.name for path in (tmp_path / "gpu").iterdir())
    assert len(files) == 4  # three shards and the index
    for file in files:
        assert (tmp_path / "gpu" / file).read_bytes() == (tmp_path / "cpu" / file).read_bytes()


@pytest.mark.parametrize("size", [1, 7, CHUNK_WORDS, 2 * CHUNK_WORDS + 3])
def test_a_gpu_computes_the_checksums_that_a_cpu_does(size: int) -> None:
    for dtype in (torch.float16, torch.float32):
        tensor = torch.randn(size, device="cuda").to(dtype)
        assert checksum(tensor).tolist() == checksum(tensor.cpu()).tolist()


def test_digests_of_a_gpu_tell_one_bit_apart() -> None:
    tensor = torch.randn(5000, 1000, device="cuda").half()
    other = tensor.clone()
    other.view(torch.int16)[1234, 567] ^= 1
    with TensorDigests() as digests:
        digests.add("one", tensor, torch.float16)
        digests.add("same", tensor.float(), torch.float16)
        digests.add("other", other, torch.float16)
        found = digests.finish()
    assert found["one"] == found["same"] != found["other"]

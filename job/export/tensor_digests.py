"""Digests of tensors, by which a tensor that was loaded again is compared with the merged one.

On a CPU they are SHA-256. On a GPU they are 128-bit checksums that the GPU computes, because
copying a large model to the host and hashing it there would take longer than writing it.

The checksum is two sums, modulo 2^64, of the tensor's 32-bit words, each multiplied by an odd
64-bit number of its own, by position (multiply-shift hashing, Dietzfelbinger et al. 1997). A single
changed word always changes both sums. Any other difference that nobody made to deceive, such as
rows that were exchanged, goes unnoticed with a probability below 2^-50. Sums of integers do not
depend on their order, so that they are the same however a GPU computes them.
"""

import hashlib
import os
from functools import cache, partial
from typing import TYPE_CHECKING

from job.families.weight_files import raw
from job.storage.background import BackgroundTasks

if TYPE_CHECKING:
    import torch

HASHED_ON = ("cpu",)
"""Devices whose tensors are hashed on the host; others compute checksums."""
CHUNK_WORDS = 2**22
"""32-bit words for which products are computed at a time: 32 MiB of them."""
MAX_THREADS = 8


class TensorDigests:
    """Computes digests while the caller makes the next tensor; a context manager.

    On a CPU a few threads hash as many tensors, on copies in the dtype to compare.
    """

    def __init__(self) -> None:
        threads = max(2, min(MAX_THREADS, len(os.sched_getaffinity(0))))
        self._hashing = BackgroundTasks("digest", threads=threads, max_pending=threads)
        self._digests: dict[str, str] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "TensorDigests":
        return self

    def __exit__(self, *error: object) -> None:
        self._hashing.__exit__(*error)

    def add(self, name: str, tensor: "torch.Tensor", dtype: "torch.dtype") -> None:
        """Adds the digest of the tensor in this dtype. The tensor must not be changed."""
        if tensor.device.type in HASHED_ON:
            self._hashing.submit(partial(self._hash, name, tensor, dtype))
        else:
            self._sums[name] = checksum(tensor.to(dtype))

    def finish(self) -> dict[str, str]:
        """Waits for all digests; returns them by name."""
        import torch

        self._hashing.finish()
        if self._sums:  # all in one copy, as every copy waits for the GPU
            sums = torch.stack(list(self._sums.values())).tolist()
            for name, (one, other) in zip(self._sums, sums, strict=True):
                self._digests[name] = f"sums:{one % 2**64:016x}{other % 2**64:016x}"
        return self._digests

    def _hash(self, name: str, tensor: "torch.Tensor", dtype: "torch.dtype") -> None:
        self._digests[name] = sha256(tensor.to(dtype))


def sha256(tensor: "torch.Tensor") -> str:
    """SHA-256 of the tensor's bytes."""
    return hashlib.sha256(raw(tensor)).hexdigest()


def checksum(tensor: "torch.Tensor") -> "torch.Tensor":
    """The two sums of the tensor's words, (2,) int64 on its device; nothing waits for them."""
    import torch

    words = _words(tensor)
    total = torch.zeros(2, dtype=torch.int64, device=words.device)
    chunks, factors = words.split(CHUNK_WORDS), _factors(str(words.device))
    # The factors are the same in every chunk, and differ by an odd number of the chunk's.
    steps = _random_odd(2 * len(chunks), 2).tolist()
    for number, chunk in enumerate(chunks):
        for which in range(2):
            products = chunk * factors[which, : len(chunk)]
            total[which] += products.sum() * steps[2 * number + which]
    return total


def _words(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor's bytes as 32-bit words, padded with zeros."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 4 or flat.storage_offset() % 4:
        padded = torch.zeros(-(-flat.numel() // 4) * 4, dtype=torch.uint8, device=flat.device)
        padded[: flat.numel()] = flat
        flat = padded
    return flat.view(torch.int32)


@cache
def _factors(device: str) -> "torch.Tensor":
    """(2, CHUNK_WORDS) odd numbers, the same on every device."""
    return _random_odd(2 * CHUNK_WORDS, 1).reshape(2, CHUNK_WORDS).to(device)


@cache
def _random_odd(count: int, seed: int) -> "torch.Tensor":
    import torch

    generator = torch.Generator().manual_seed(seed)
    lowest, highest = -(2**63), 2**63 - 1
    return torch.randint(lowest, highest, (count,), dtype=torch.int64, generator=generator) | 1

"""The bytes of tensors in the host's memory, a piece at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PIECE = 2**25
"""Bytes in a piece. Two of them are pinned for tensors on a GPU."""


class HostPieces:
    """Reads tensors piece by piece; for one thread.

    Tensors on a CPU are not copied. Those on a GPU are copied through two pinned buffers, one of
    which is filled while the other is used: into pageable memory a GPU copies at a fraction of the
    speed, and a tensor of any size needs no memory of its own on the host.
    """

    def __init__(self) -> None:
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, tensor: "torch.Tensor") -> Iterator[memoryview]:
        """The tensor's bytes, in order. A piece is valid until the next one is asked for."""
        import torch

        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if flat.device.type == "cuda":
            yield from self._copied(flat)
            return
        for part in flat.cpu().split(PIECE):
            yield part.numpy().data

    def _copied(self, flat: "torch.Tensor") -> Iterator[memoryview]:
        filled: tuple[torch.Tensor, torch.cuda.Event] | None = None
        for number, part in enumerate(flat.split(PIECE)):
            # The piece before the last one, which was in this buffer, is no longer used.
            copying = self._start_copy(part, number % 2)
            if filled is not None:
                yield _await(*filled)
            filled = copying
        if filled is not None:
            yield _await(*filled)

    def _start_copy(
        self, part: "torch.Tensor", number: int
    ) -> "tuple[torch.Tensor, torch.cuda.Event]":
        import torch

        if self._buffers is None:
            one, other = (torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2))
            self._buffers = one, other
        buffer = self._buffers[number][: part.numel()]
        # The current device is the thread's own. On its default stream, which all threads share,
        # the copy follows the computation of the tensor.
        with torch.cuda.device(part.device):
            buffer.copy_(part, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return buffer, copied


def _await(buffer: "torch.Tensor", copied: "torch.cuda.Event") -> memoryview:
    copied.synchronize()
    return buffer.numpy().data

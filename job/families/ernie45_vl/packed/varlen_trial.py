"""Whether PyTorch's variable-length attention serves on a device: found by trying it."""

import functools
from collections.abc import Sequence

import torch

from job import log
from job.families.ernie45_vl.packed.varlen_attention import PackedSequences, attention
from job.families.outcome import Outcome, attempt, difference, left, milliseconds, unless_slower

WAY = "attention by boundaries"
LENGTHS = [33, 1, 250, 7, 64, 600, 128, 90, 5, 300]
TOLERANCE = 3e-2
"""Of bf16, relative to the norm; the padded grid in bf16 is off by about 4e-3."""
LAYERS = ((8, 2, 128, True), (4, 4, 80, False))
"""Heads of queries and of keys, their width, and whether causal: of text, and of images."""

_known: list[bool] = []


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether the device uses the varlen kernel; tries it unless `use` has set the answer."""
    if _known and device.type != "cpu":
        return _known[-1]
    outcome = trial(device)
    say = log.debug if device.type == "cpu" else log.info
    say(outcome.way, **{"taken" if outcome.taken else "left": outcome.reason})
    return outcome.taken


def use(taken: bool) -> None:
    """Makes this the answer of `serves` on every GPU, without another trial."""
    _known.append(taken)
    serves.cache_clear()


def trial(device: torch.device) -> Outcome:
    """Compares the kernel with a padded grid in fp32, and its time with the grid's."""
    if device.type == "cpu":
        return left(WAY, "a CPU has no kernel for it")
    with torch.inference_mode(mode=False):  # for the gradients, if the first use is generation
        return _trial(device)


def _trial(device: torch.device) -> Outcome:
    grid = PackedSequences.of(LENGTHS)
    grid = grid._replace(
        indices=grid.indices.to(device),
        mask=grid.mask.to(device),
        cu_seqlens=grid.cu_seqlens.to(device),
    )
    inputs = [_inputs(*layer[:3], device) for layer in LAYERS]

    def results(sequences: PackedSequences, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        every: list[torch.Tensor] = []
        for (*_, width, causal), tensors in zip(LAYERS, inputs, strict=True):
            with torch.enable_grad():
                q, k, v = (tensor.to(dtype).detach().requires_grad_() for tensor in tensors)
                out = attention(q, k, v, sequences, causal=causal, scale=width**-0.5)
                every += [out.detach(), *torch.autograd.grad(out, (q, k, v), out.detach())]
        return every

    bounded = functools.partial(results, grid._replace(varlen=True), torch.bfloat16)
    padded = functools.partial(results, grid, torch.bfloat16)
    exact = results(grid, torch.float32)
    outcome = attempt(WAY, bounded, exact, tolerance=TOLERANCE)
    if not outcome.taken:
        return outcome
    # The grid must serve itself to be a reason against the kernel.
    if difference(padded(), exact) > TOLERANCE:
        return outcome
    return unless_slower(outcome, milliseconds(padded, device), "a padded grid")


def _inputs(heads: int, key_heads: int, width: int, device: torch.device) -> list[torch.Tensor]:
    """Queries, keys and values, (T, H, D)."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(LENGTHS), count, width, generator=generator).to(device, torch.bfloat16)
        for count in (heads, key_heads, key_heads)
    ]

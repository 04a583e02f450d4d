"""A frozen linear layer and its LoRA adapter in one matrix, so that one product computes both.

A separate adapter is memory-bound: it reads the layer's input again and writes an output of the
same size, for few FLOPs. Fused, its matrices only add some rows and columns to the frozen weight:

    [ weight  up ]      (out, in)   (out, R)
    [ down    0  ]      (R, in)     (R, R)

Forward, with the output of `down` appended to the input, x' = [x, x·downᵀ], the upper rows give
y = x'·[weight, up]ᵀ. Backward, with the gradient of `up`'s input appended, g' = [g, g·up], the left
columns give dx = g'·[weight; down]. Layers that read the same input are stacked in one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import linear

from job.families.autograd import Context
from job.families.split_gradients import ALIGNMENT, concat_gradients


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedLoraLinear:
    """One matrix that holds linear layers that read the same input, and their adapters."""

    matrix: torch.Tensor
    """(out + R, in + R); R is the sum of the adapters' ranks, padded to `ALIGNMENT`."""
    bias: torch.Tensor | None
    """(out,)"""
    outputs: tuple[int, ...]
    """Each layer's number of output features; they add up to `out`."""
    ranks: tuple[int, ...]
    adapter: str
    """The adapter's name."""

    @classmethod
    def of(
        cls,
        weights: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        ranks: Sequence[int],
        adapter: str,
    ) -> "FusedLoraLinear":
        """Copies the frozen weights, (out, in) each; the adapters' parts are zero."""
        rank = sum(ranks) + -sum(ranks) % ALIGNMENT
        outputs = tuple(len(weight) for weight in weights)
        inputs = weights[0].shape[1]
        matrix = weights[0].new_zeros(sum(outputs) + rank, inputs + rank)
        # Blocks are compiled for any number of rows, but for matrices of one size.
        torch._dynamo.mark_static(matrix)
        fused = cls(matrix=matrix, bias=bias, outputs=outputs, ranks=tuple(ranks), adapter=adapter)
        for view, weight in zip(fused.weights(), weights, strict=True):
            view.copy_(weight)
        return fused

    def weights(self) -> list[torch.Tensor]:
        """Each layer's frozen weight (out, in), as a view of the matrix."""
        out, inputs = self._frozen_shape()
        return list(self.matrix[:out, :inputs].split(self.outputs))

    def adapters(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's `down` (r, in), which includes the scaling, and `up` (out, r), as views."""
        out, inputs = self._frozen_shape()
        down, up = self.matrix[out:, :inputs], self.matrix[:out, inputs:]
        return _by_layer(down, up, self.outputs, self.ranks)

    def _frozen_shape(self) -> tuple[int, int]:
        out = sum(self.outputs)
        return out, self.matrix.shape[1] - (self.matrix.shape[0] - out)

    def __call__(
        self,
        x: torch.Tensor,
        downs: Sequence[torch.Tensor],
        ups: Sequence[torch.Tensor],
        *,
        parts: int | None = None,
        input_saved: bool = False,
    ) -> list[torch.Tensor]:
        """The output (…, out) of each layer for x (…, in), or of a single layer in equal parts.

        `downs` and `ups` only receive gradients; the values in `matrix` are used. `input_saved`
        means that the previous operation saves x for its backward pass.
        """
        widths = parts * (sum(self.outputs) // parts,) if parts else self.outputs
        outputs: Sequence[torch.Tensor] = _FusedProduct.apply(
            x.flatten(0, -2),
            self.matrix,
            self.bias,
            self.outputs,
            self.ranks,
            widths,
            input_saved,
            *downs,
            *ups,
        )
        return [output.unflatten(0, x.shape[:-1]) for output in outputs]


class _FusedContext(Context, Protocol):
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype


class _FusedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _FusedContext,
        x: torch.Tensor,
        matrix: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: tuple[int, ...],
        ranks: tuple[int, ...],
        widths: tuple[int, ...],
        input_saved: bool,
        *adapters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        out, inputs = sum(outputs), x.shape[1]
        down = matrix[out:, :inputs]  # (R, in)
        if input_saved:  # x stays in memory until the backward pass anyway, so save no copy
            inner = linear(x, down)  # (T, R)
            extended = torch.cat([x, inner], dim=1)  # (T, in + R)
            ctx.save_for_backward(x, inner, matrix)
        else:
            extended = torch.cat([x, x.new_zeros(len(x), len(down))], dim=1)  # (T, in + R)
            fill_product(extended, down.t())
            ctx.save_for_backward(extended[:, :inputs], extended[:, inputs:], matrix)
        ctx.outputs, ctx.ranks, ctx.dtype = outputs, ranks, adapters[0].dtype
        return linear(extended, matrix[:out], bias).split(widths, dim=1)

    @staticmethod
    def backward(ctx: _FusedContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, matrix = ctx.saved_tensors  # (T, in), (T, R)
        out, inputs = sum(ctx.outputs), x.shape[1]
        extended = concat_gradients(grads, inner)  # (T, out + R)
        fill_product(extended, matrix[:out, inputs:])
        down_grad = extended[:, out:].t() @ x  # (R, in)
        up_grad = extended[:, :out].t() @ inner  # (out, R)
        by_layer = _by_layer(down_grad, up_grad, ctx.outputs, ctx.ranks)
        downs, ups = (
            [grad.to(ctx.dtype) for grad in grads] for grads in zip(*by_layer, strict=True)
        )
        return extended @ matrix[:, :inputs], *(6 * [None]), *downs, *ups


def _by_layer(
    downs: torch.Tensor, ups: torch.Tensor, outputs: Sequence[int], ranks: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's rows (r, in) of `downs` (R, in), and its diagonal block (out, r) of `ups`
    (out, R)."""
    rank = sum(ranks)
    rows = downs[:rank].split(list(ranks))
    columns = ups[:, :rank].split(list(ranks), dim=1)
    blocks = [column.split(list(outputs))[n] for n, column in enumerate(columns)]
    return list(zip(rows, blocks, strict=True))


def _fill_product(extended: torch.Tensor, right: torch.Tensor) -> None:
    """Fills the last R columns of (T, n + R) with the product of the first n and (n, R)."""
    rows, columns = right.shape
    torch.mm(extended.narrow(1, 0, rows), right, out=extended.narrow(1, rows, columns))


# A custom operator: the compiler would write the product to a new tensor and copy it. Declared with
# `Library`, which has the least overhead per call: a step makes hundreds of them.
_OPERATIONS = torch.library.Library("finetune_job", "FRAGMENT")
_OPERATIONS.define("fill_product(Tensor(a!) extended, Tensor right) -> ()")
_OPERATIONS.impl("fill_product", _fill_product, "CompositeExplicitAutograd")
torch.library.register_fake(
    "finetune_job::fill_product", lambda extended, right: None, lib=_OPERATIONS
)
fill_product = torch.ops.finetune_job.fill_product

"""Frozen linear layers and their adapters as one matrix, so that one product computes both.

What an adapter adds is a product of its own: it reads the layer's input again and writes as much as
the layer does, for few operations. Beside the frozen weights its two small matrices are some rows
and columns more:

    [ weights  up ]
    [ down      0 ]

The upper part multiplies inputs that have at their end what `down` makes of them; the left part
multiplies gradients that have at their end what `up` makes of them. Layers that read the same input
stand one below the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from job.families.split_gradients import ALIGNED, joined


@dataclass(frozen=True, kw_only=True, eq=False)
class Wide:
    """Layers of one input and their adapters, laid into one matrix."""

    matrix: torch.Tensor
    """(out + R, in + R), where R is all adapters' ranks, filled up to what kernels take."""
    bias: torch.Tensor | None
    """(out,)"""
    outputs: tuple[int, ...]
    """How many of `out` are each layer's."""
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
    ) -> "Wide":
        """A copy of the frozen weights, (out, in) each, with zeros for the adapters."""
        rank = sum(ranks) + -sum(ranks) % ALIGNED
        outputs = tuple(len(weight) for weight in weights)
        width = weights[0].shape[1]
        matrix = weights[0].new_zeros(sum(outputs) + rank, width + rank)
        # Compiled blocks are made for any number of rows, but for matrices of one size.
        torch._dynamo.mark_static(matrix)
        made = cls(matrix=matrix, bias=bias, outputs=outputs, ranks=tuple(ranks), adapter=adapter)
        for own, weight in zip(made.weights(), weights, strict=True):
            own.copy_(weight)
        return made

    def weights(self) -> list[torch.Tensor]:
        """Each layer's frozen weights, (out, in), as they lie in the matrix."""
        out, width = self._corner()
        return list(self.matrix[:out, :width].split(self.outputs))

    def adapters(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's `down` (r, in), which holds the scaling, and `up` (out, r)."""
        out, width = self._corner()
        return _each(self.matrix[out:, :width], self.matrix[:out, width:], self.outputs, self.ranks)

    def _corner(self) -> tuple[int, int]:
        """The frozen weights' rows and columns."""
        out = sum(self.outputs)
        return out, self.matrix.shape[1] - (self.matrix.shape[0] - out)

    def __call__(
        self,
        x: torch.Tensor,
        downs: Sequence[torch.Tensor],
        ups: Sequence[torch.Tensor],
        *,
        parts: int | None = None,
        kept: bool = False,
    ) -> list[torch.Tensor]:
        """(…, out) of each layer from (…, in), or so many equal parts of a single one's.

        Of the adapters' own matrices no value is read: gradients go to them. `kept` says that
        whatever made x keeps it for its own gradient.
        """
        widths = parts * (sum(self.outputs) // parts,) if parts else self.outputs
        made: Sequence[torch.Tensor] = _Product.apply(
            x.flatten(0, -2),
            self.matrix,
            self.bias,
            self.outputs,
            self.ranks,
            widths,
            kept,
            *downs,
            *ups,
        )
        return [each.unflatten(0, x.shape[:-1]) for each in made]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        matrix: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: tuple[int, ...],
        ranks: tuple[int, ...],
        widths: tuple[int, ...],
        kept: bool,
        *adapters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        out, width = sum(outputs), x.shape[1]
        downs = matrix[out:, :width]  # (R, in)
        if kept:
            inner = linear(x, downs)  # (T, R)
            both = torch.cat([x, inner], dim=1)
            ctx.save_for_backward(x, inner, matrix)
        else:
            both = torch.cat([x, x.new_zeros(len(x), len(downs))], dim=1)
            fill(both, downs.t())
            ctx.save_for_backward(both[:, :width], both[:, width:], matrix)
        ctx.outputs, ctx.ranks, ctx.dtype = outputs, ranks, adapters[0].dtype
        return linear(both, matrix[:out], bias).split(widths, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, matrix = ctx.saved_tensors
        out, width = sum(ctx.outputs), x.shape[1]
        whole = joined(grads, inner)  # (T, out + R)
        fill(whole, matrix[:out, width:])
        by_downs = whole[:, out:].t() @ x  # (R, in)
        by_ups = whole[:, :out].t() @ inner  # (out, R)
        each = _each(by_downs, by_ups, ctx.outputs, ctx.ranks)
        downs, ups = ([part.to(ctx.dtype) for part in parts] for parts in zip(*each, strict=True))
        return whole @ matrix[:, :width], *(6 * [None]), *downs, *ups


def _each(
    downs: torch.Tensor, ups: torch.Tensor, outputs: Sequence[int], ranks: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's (r, in) of all (R, in), and (out, r) along the diagonal of all (out, R)."""
    rank = sum(ranks)
    rows = downs[:rank].split(list(ranks))
    columns = ups[:, :rank].split(list(ranks), dim=1)
    blocks = [column.split(list(outputs))[n] for n, column in enumerate(columns)]
    return list(zip(rows, blocks, strict=True))


def _fill(both: torch.Tensor, right: torch.Tensor) -> None:
    """Fills the end of each row of (T, n + R) with the product of its beginning and (n, R)."""
    rows, columns = right.shape
    torch.mm(both.narrow(1, 0, rows), right, out=both.narrow(1, rows, columns))


# An operation of its own, as the compiler would write the product elsewhere and copy all of it.
# Declared so that a call costs the host least: a step makes some hundred of them.
_OPERATIONS = torch.library.Library("finetune_job", "FRAGMENT")
_OPERATIONS.define("fill(Tensor(a!) both, Tensor right) -> ()")
_OPERATIONS.impl("fill", _fill, "CompositeExplicitAutograd")
torch.library.register_fake("finetune_job::fill", lambda both, right: None, lib=_OPERATIONS)
fill = torch.ops.finetune_job.fill

"""A frozen weight in 4 bits, unpacked whenever a product needs it.

It has the shape and dtype of the weight that it stands for, so a model, and the adapters on it,
need not know. The products here unpack it again for the backward pass: autograd would keep the
unpacked weight until then, which is what packing avoids. Any other operation unpacks it first.
"""

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from job.families.autograd import Context
from job.families.four_bit import BLOCK, FourBit
from job.families.grouped_products.choice import grouped_mm

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# It says in which optional package its CPU kernels would be faster.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_aten = torch.ops.aten


class FourBitTensor(torch.Tensor):
    """A weight as 4-bit codes with a scale for each `BLOCK` of them; frozen."""

    codes: torch.Tensor
    """(weights / 2, 1), uint8."""
    state: "QuantState"
    """Of the weights as rows of a block each: the kernels for CPUs are wrong for wider rows that
    blocks do not divide."""

    @staticmethod
    def __new__(
        cls, codes: torch.Tensor, state: "QuantState", shape: torch.Size
    ) -> "FourBitTensor":
        made: FourBitTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=state.dtype, device=codes.device, requires_grad=False
        )
        return made

    def __init__(self, codes: torch.Tensor, state: "QuantState", shape: torch.Size) -> None:
        self.codes, self.state = codes, state

    @classmethod
    def of(cls, weight: torch.Tensor, four_bit: FourBit) -> "FourBitTensor":
        """Packs a weight of any shape."""
        from bitsandbytes.functional import quantize_4bit

        flat = weight.detach().contiguous().flatten()
        codes, state = quantize_4bit(
            flat if flat.numel() % BLOCK else flat.view(-1, BLOCK),
            blocksize=BLOCK,
            quant_type=four_bit.quant_type,
            compress_statistics=four_bit.double_quant,
        )
        return cls(codes, state, weight.shape)

    def unpacked(self) -> torch.Tensor:
        """The weight, in its shape and dtype."""
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = dequantize_4bit(self.codes, self.state)
        return weight.view(self.shape)

    def expert(self, number: int) -> torch.Tensor:
        """`self[number]` without unpacking the rest: a loop over experts takes them one by one."""
        from bitsandbytes.functional import QuantState

        state, size = self.state, self.shape[1:].numel()
        if self.ndim < 2 or size % (2 * BLOCK):
            return self.unpacked()[number]
        number %= self.shape[0]
        blocks = slice(number * size // BLOCK, (number + 1) * size // BLOCK)
        part = QuantState(
            absmax=_scales(state, blocks),
            shape=torch.Size((size // BLOCK, BLOCK)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        codes = self.codes[number * size // 2 : (number + 1) * size // 2]
        return FourBitTensor(codes, part, self.shape[1:])

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is linear and (found := _linear_arguments(*args, **(kwargs or {}))):
            return _Linear.apply(*found)
        if func is torch.Tensor.detach and isinstance(args[0], FourBitTensor):
            return args[0]  # it has no gradient; and a new one cannot be made in inference mode
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FourBitTensor):
            index = args[1]
            if isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype != torch.bool:
                index = int(index)
            if type(index) is int:
                return args[0].expert(index)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks its first arguments
        cls,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func in (_aten.detach.default, _aten.alias.default):
            same = cast(FourBitTensor, args[0])
            return FourBitTensor(same.codes, same.state, same.shape)
        if func is _aten.set_.source_Tensor and isinstance(args[1], FourBitTensor):
            same = cast(FourBitTensor, args[0])  # as parametrizations do, which PEFT uses
            same.codes, same.state = args[1].codes, args[1].state
            return same
        if func._schema.is_mutable and isinstance(args[0], FourBitTensor):
            raise RuntimeError(f"a weight in 4 bits cannot be changed: {func}")
        args, kwargs = tree_map_only(
            FourBitTensor, FourBitTensor.unpacked, (args, dict(kwargs or {}))
        )
        return func(*args, **kwargs)


def frozen_grouped_mm(
    rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *, is_transposed: bool = False
) -> torch.Tensor:
    """`grouped_mm` of rows (M, in) by the transposed weight (E, out, in), packed or not.

    With `is_transposed`, the weight is (E, in, out). Differentiable with respect to a packed
    weight's rows only.
    """
    if isinstance(weight, FourBitTensor):
        product: torch.Tensor = _GroupedProduct.apply(rows, weight, ends, is_transposed)
        return product
    return grouped_mm(rows, weight if is_transposed else weight.transpose(1, 2), ends)


class _LinearContext(Context, Protocol):
    weight: FourBitTensor
    dtype: torch.dtype
    needs_input_grad: tuple[bool, ...]


class _Linear(torch.autograd.Function):
    """(…, in) to (…, out); only the input has a gradient."""

    @staticmethod
    def forward(
        ctx: _LinearContext, x: torch.Tensor, weight: FourBitTensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return linear(x, weight.unpacked(), bias)

    @staticmethod
    def backward(ctx: _LinearContext, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (grad @ ctx.weight.unpacked().to(grad.dtype)).to(ctx.dtype), None, None


class _GroupedContext(_LinearContext, Protocol):
    is_transposed: bool


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _GroupedContext,
        rows: torch.Tensor,
        weight: FourBitTensor,
        ends: torch.Tensor,
        is_transposed: bool,
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype, ctx.is_transposed = weight, rows.dtype, is_transposed
        ctx.save_for_backward(ends)
        unpacked = weight.unpacked()
        return grouped_mm(rows, unpacked if is_transposed else unpacked.transpose(1, 2), ends)

    @staticmethod
    def backward(
        ctx: _GroupedContext, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (ends,) = ctx.saved_tensors
        unpacked = ctx.weight.unpacked()
        weight = unpacked.transpose(1, 2) if ctx.is_transposed else unpacked  # (E, out, in)
        product = grouped_mm(grad.contiguous(), weight, ends)  # (M, in)
        return product.to(ctx.dtype), None, None, None


def _linear_arguments(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, FourBitTensor, torch.Tensor | None] | None:
    """The arguments of `linear` if its weight is packed and its bias has no gradient."""
    if not isinstance(weight, FourBitTensor) or isinstance(input, FourBitTensor):
        return None
    return (input, weight, bias) if bias is None or not bias.requires_grad else None


def _scales(state: "QuantState", blocks: slice) -> torch.Tensor:
    """The scales of these blocks, in fp32; no more than those are unpacked, or kept alive."""
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    if not state.nested:
        return state.absmax[blocks]
    size = state.state2.blocksize
    first, last = blocks.start // size, -(-blocks.stop // size)
    scales: torch.Tensor = dequantize_blockwise(
        state.absmax[first * size : last * size],
        QuantState(
            absmax=state.state2.absmax[first:last],
            code=state.state2.code,
            blocksize=size,
            dtype=state.state2.dtype,
        ),
    )
    return scales[blocks.start - first * size : blocks.stop - first * size].float() + state.offset

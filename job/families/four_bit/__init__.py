"""A frozen base in 4 bits, for all families: QLoRA.

- `packed_weights` chooses the weights: linear layers and routed experts of the language model;
- `tensor` has `FourBitTensor`, a weight that stays packed until a product needs it;
- `experts` computes routed experts of Transformers' models with such weights;
- `quantizer` packs weights while Transformers reads the checkpoint, one after another.

The merge reads the original weights again (`job.families.stored_weights`).

bitsandbytes does the arithmetic. https://arxiv.org/abs/2305.14314 describes the method.
"""

from dataclasses import dataclass
from typing import Literal

BLOCK = 64
"""Weights that share a scale."""


@dataclass(frozen=True, kw_only=True)
class FourBit:
    """How weights are packed."""

    quant_type: Literal["nf4", "fp4"]
    double_quant: bool
    """Whether the scales are quantized too, to 8 bits."""
    skip: tuple[str, ...] = ()
    """Endings of the names of modules that keep their weights, because they are trained in full."""

    def packed_bytes(self, weights: int) -> int:
        """The bytes of this number of weights, with their scales."""
        blocks = -(-weights // BLOCK)
        scales = blocks + 4 * -(-blocks // 256) if self.double_quant else 4 * blocks
        return -(-weights // 2) + scales

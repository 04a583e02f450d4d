"""The decoder layers for one token of each row, prepared for many steps.

Weights do not change while answers are generated, so all that a training step derives from them
anew is derived once here: adapters in the weights' dtype with their scaling applied, matrices that
read the same input stacked, and the router's weights in parts. A step is bound by the number of its
kernels and by the weights that it reads, and this halves the kernels. Adapters stay apart from the
frozen weights: merged weights would be rounded again.

B rows, H is the hidden size, R the sum of the adapters' ranks.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn.functional import linear, rms_norm
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.ernie45_vl.packed.expert_lora import CastLora, adapters_of
from job.families.ernie45_vl.packed.experts import sorted_experts
from job.families.ernie45_vl.packed.router import chosen_experts, route, router_logits, router_parts
from job.families.four_bit.tensor import FourBitTensor
from job.families.lora.linear import is_plain_lora
from job.families.lora.peft_layers import sole_active_adapter


class StoredTokens(Protocol):
    """The keys and values of all tokens of B rows, the current ones included."""

    @property
    def rotation(self) -> torch.Tensor:
        """(B, 1, D / 2), complex: RoPE of each row's token."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Stores (B, heads, D) and attends to all tokens of each row: (B, heads · D)."""


class DecodeLayer:
    """A decoder layer of the model, for one token of each row."""

    def __init__(self, layer: native.Ernie4_5_VLMoeDecoderLayer, *, stack: bool) -> None:
        """`stack` allows copies of matrices that read the same input; see `stacked_bytes`."""
        attn = layer.self_attn
        self._number, self._scale = attn.layer_idx, attn.scaling
        self._head_dim = attn.head_dim
        self._heads = attn.config.num_attention_heads
        self._rotated = self._heads + attn.config.num_key_value_heads
        self._qkv = Projection((attn.q_proj, attn.k_proj, attn.v_proj), stack=stack)
        self._o = Projection((attn.o_proj,))
        self._input_norm, self._output_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._experts = None
        dense: nn.Module | None = layer.mlp
        if isinstance(layer.mlp, native.Ernie4_5_VLMoeMoeBlock):
            self._experts = _TextExperts(layer.mlp.text_moe)
            dense = layer.mlp.shared_experts
        self._dense = None if dense is None else _FeedForward(dense, stack=stack)

    def __call__(self, hidden: torch.Tensor, tokens: StoredTokens) -> torch.Tensor:
        """(B, H) to (B, H)."""
        qkv = self._qkv(normed(self._input_norm, hidden)).unflatten(-1, (-1, self._head_dim))
        pairs = torch.view_as_complex(qkv[:, : self._rotated].float().unflatten(-1, (-1, 2)))
        rotated = torch.view_as_real(pairs * tokens.rotation).flatten(-2).to(qkv.dtype)
        query, key = rotated.split([self._heads, self._rotated - self._heads], dim=1)
        value = qkv[:, self._rotated :]
        attended = tokens.attend(self._number, query, key, value, self._scale)
        hidden = hidden + self._o(attended)
        inner = normed(self._output_norm, hidden)
        outputs = [part(inner) for part in (self._experts, self._dense) if part is not None]
        return hidden + (outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1])


def stacked_bytes(layers: Sequence[native.Ernie4_5_VLMoeDecoderLayer]) -> int:
    """The memory of the copies that `stack` allows."""
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return sum(
        parameter.nbytes
        for layer in layers
        for name, parameter in layer.named_parameters()
        if any(f".{each}." in name for each in names) and "lora_" not in name
    )


class Projection:
    """Linear layers that read the same input, as one product, and one more for their adapters."""

    def __init__(self, layers: Sequence[nn.Module], *, stack: bool = True) -> None:
        self._layers = layers
        self._weight: torch.Tensor | None = None  # (out, in); None if the layers run themselves
        if not all(_is_plain(layer) for layer in layers) or (len(layers) > 1 and not stack):
            return
        bases = [_base(layer) for layer in layers]
        weights = [base.weight.detach() for base in bases]
        self._bias = bases[0].bias if len(bases) == 1 else None
        several_biases = len(bases) > 1 and any(base.bias is not None for base in bases)
        if len(bases) > 1 and any(isinstance(weight, FourBitTensor) for weight in weights):
            return  # side by side they would be unpacked for good
        if several_biases or len({weight.dtype for weight in weights}) > 1:
            return
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._adapters = _adapters(layers, weights)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in) to (B, out), the layers' outputs side by side."""
        if self._weight is None:
            return torch.cat([layer(x) for layer in self._layers], dim=-1)
        out = linear(x, self._weight, self._bias)
        if self._adapters is not None:
            down, up = self._adapters
            out.addmm_(x @ down, up)
        return out


def _adapters(
    layers: Sequence[nn.Module], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The adapters of the layers: (in, R), with the scaling, and (R, out); None without any."""
    downs, ups = [], []
    dtype, start = weights[0].dtype, 0
    for layer, weight in zip(layers, weights, strict=True):
        if isinstance(layer, PeftLinear) and (name := sole_active_adapter(layer)) is not None:
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight  # (r, in), (out, r)
            downs.append((down.detach().float() * layer.scaling[name]).to(dtype).t())
            column = up.new_zeros(up.shape[1], sum(map(len, weights)), dtype=dtype)
            column[:, start : start + len(weight)] = up.detach().t()
            ups.append(column)
        start += len(weight)
    return (torch.cat(downs, dim=1).contiguous(), torch.cat(ups)) if downs else None


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer is a matrix, with a plain adapter or none."""
    if not isinstance(layer, PeftLinear):
        return type(layer) is nn.Linear
    name = sole_active_adapter(layer)
    adapted = name is not None and is_plain_lora(layer, name)
    return adapted and type(layer.get_base_layer()) is nn.Linear


def _base(layer: nn.Module) -> nn.Linear:
    base = layer.get_base_layer() if isinstance(layer, PeftLinear) else layer
    assert isinstance(base, nn.Linear)
    return base


class _FeedForward:
    """The MLP of a dense layer or of shared experts; see `feed_forward`."""

    def __init__(self, mlp: nn.Module, *, stack: bool) -> None:
        self._whole: nn.Module | None = None
        if not isinstance(mlp, native.Ernie4_5_VLMoeMLP):  # one that is trained in full
            self._whole = mlp
            return
        self._gate_up = Projection((mlp.gate_proj, mlp.up_proj), stack=stack)
        self._down, self._act = Projection((mlp.down_proj,)), mlp.act_fn

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._whole is not None:
            whole: torch.Tensor = self._whole(hidden)
            return whole
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)  # (B, intermediate) each
        return self._down(self._act(gate) * up)


class _TextExperts:
    """The router and the routed experts of text tokens: all that is generated is text."""

    def __init__(self, sparse: native.Ernie4_5_VLMoeSparseMoeBlock) -> None:
        self._gate, self._experts = sparse.gate, sparse.experts
        adapters = adapters_of(self._experts)
        self._base = self._experts.get_base_layer() if adapters else self._experts
        dtype = next(p.dtype for p in self._base.parameters())
        self._parts = router_parts(self._gate) if dtype == torch.bfloat16 else None
        self._loras = {name: CastLora.of(lora, dtype) for name, lora in adapters.items()}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._parts is None:
            _, weights, index = route(self._gate, hidden)
        else:
            logits = router_logits(hidden, self._parts)
            weights, index = chosen_experts(self._gate, logits, hidden.dtype)
        if not self._loras:
            out: torch.Tensor = self._experts(hidden, index, weights)
            return out
        return sorted_experts(self._base, hidden, index, weights, self._loras)


def normed(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The RMS norm (B, H), in one kernel instead of seven."""
    if not isinstance(norm, native.Ernie4_5_VLMoeRMSNorm):
        return cast(torch.Tensor, norm(hidden))
    return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

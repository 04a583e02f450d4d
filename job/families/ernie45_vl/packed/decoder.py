"""Generation with a key-value cache of fixed size, for rows that start and end at different times.

B rows are decoded at once. Prompts are computed packed, images included; afterwards each step
computes one token per row. No step waits for the device, which counts each row's tokens itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.base import Encoded
from job.families.batches import to_device
from job.families.ernie45_vl.packed.batch import pack_prompts
from job.families.ernie45_vl.packed.experts import Modalities
from job.families.ernie45_vl.packed.model import PackedErnie, use_packed_step
from job.families.ernie45_vl.packed.rope import RotaryAngles, swap_neighbors
from job.families.ernie45_vl.packed.varlen_attention import PackedSequences, attention

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Ernie4_5_VLMoeProcessor


def decoder(
    model: "PreTrainedModel | PeftModel",
    processor: "Ernie4_5_VLMoeProcessor",
    *,
    slots: int,
    capacity: int,
) -> "PackedDecoder | None":
    """The decoder of a model whose classes are Transformers' own, else None.

    Also None if it is sharded, or if its blocks are compiled: they would be compiled anew for each
    number of tokens.

    Swaps in the packed layers; weights, names and other forward passes do not change.
    """
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    native_class = native.Ernie4_5_VLMoeForConditionalGeneration
    if type(base) not in (native_class, PackedErnie) or isinstance(base, FSDPModule):
        return None
    if any(layer._compiled_call_impl is not None for layer in base.model.language_model.layers):
        return None
    if type(base) is native_class:
        use_packed_step(base)
    return PackedDecoder(base, processor, slots=slots, capacity=capacity)


class PackedDecoder:
    """Implements `job.families.base.Decoder`."""

    def __init__(
        self,
        model: PackedErnie,
        processor: "Ernie4_5_VLMoeProcessor",
        *,
        slots: int,
        capacity: int,
    ) -> None:
        self.slots, self._capacity = slots, capacity
        self._model, self._processor = model, processor
        self._cache = _Cache(slots=slots, capacity=capacity)
        self._lengths: list[int] = []  # tokens in the cache, by row
        # The same, and the M-RoPE position of the next token, for all slots: (2, slots).
        self._counts = torch.zeros(2, slots, dtype=torch.long, device=model.device)

    def prefill(self, prompts: Sequence[Encoded]) -> torch.Tensor:
        packed = pack_prompts(prompts, self._processor)
        last = packed["supervised"]
        # A prompt ends with text, whose time, height and width positions are equal.
        following = packed["position_ids"][0, 0, last] + 1  # (N,)
        first, lengths = len(self._lengths), [len(prompt.input_ids) for prompt in prompts]
        assert first + len(lengths) <= self.slots
        batch = to_device(packed, self._model.device)
        rows = self._model.sequences(batch, "row")
        hidden, _ = self._model.hidden_states(
            batch, _Prompts(cache=self._cache, sequences=rows, first=first)
        )
        self._lengths += lengths
        counts = torch.stack([torch.tensor(lengths), following])  # (2, N)
        self._counts[:, first : len(self._lengths)] = counts.to(self._counts.device)
        return self._model.lm_head(hidden)  # (N, V)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        text, device = self._model.model.language_model, tokens.device
        rows = len(self._lengths)
        hidden = text.embed_tokens(tokens)  # (B, H)
        lengths, positions = self._counts[:, :rows]  # (B,) each
        cos, sin = text.rotary_emb(hidden, positions.expand(3, 1, -1))  # (1, B, D) each
        angles = RotaryAngles.of(cos[0], sin[0], swap_neighbors)
        every = torch.arange(rows, device=device)
        modalities = Modalities(text=every, vision=every[:0], grouped=every, inverse=every)
        stored = _NextTokens(
            cache=self._cache,
            lengths=lengths,
            longest=max(self._lengths) + 1,
        )
        for layer in text.layers:
            hidden, _ = layer(hidden, angles, sequences=stored, modalities=modalities)
        self._counts[:, :rows] += 1
        self._lengths = [length + 1 for length in self._lengths]
        return self._model.lm_head(text.norm(hidden))  # (B, V)

    def drop(self, row: int) -> None:
        last = len(self._lengths) - 1
        if row != last:
            self._cache.copy(last, row, length=self._lengths[last])
            self._counts[:, row] = self._counts[:, last]
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """Keys and values by layer, (slots, heads, capacity, D) each; allocated on first use."""

    slots: int
    capacity: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, for tokens whose keys are `like` (T, heads, D)."""
        if layer not in self.layers:
            _, heads, size = like.shape
            shape = (self.slots, heads, self.capacity, size)
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]

    def copy(self, source: int, target: int, *, length: int) -> None:
        """Copies a row's keys and values."""
        for both in self.layers.values():
            for stored in both:
                stored[target, :, :length] = stored[source, :, :length]


@dataclass(frozen=True, kw_only=True)
class _Prompts:
    """Prompts that are computed whole, for rows from `first` on."""

    cache: _Cache
    sequences: PackedSequences
    first: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        for stored, new in zip(self.cache.of(layer, key), (key, value), strict=True):
            padded = self.sequences.pad(new)  # (N, heads, L, D)
            count, _, longest, _ = padded.shape
            stored[self.first : self.first + count, :, :longest] = padded
        return attention(query, key, value, self.sequences, causal=True, scale=scale)


@dataclass(frozen=True, kw_only=True)
class _NextTokens:
    """One token of each of the first B rows, after `lengths` (B,) tokens in the cache."""

    cache: _Cache
    lengths: torch.Tensor
    longest: int
    """The most tokens of a row, these included."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        rows = torch.arange(len(query), device=query.device)
        keys, values = self.cache.of(layer, key)
        keys[rows, :, self.lengths], values[rows, :, self.lengths] = key, value
        visible = torch.arange(self.longest, device=query.device) <= self.lengths[:, None]  # (B, L)
        out = scaled_dot_product_attention(
            query[:, :, None],  # (B, heads, 1, D)
            keys[: len(query), :, : self.longest],
            values[: len(query), :, : self.longest],
            attn_mask=visible[:, None, None],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[:, :, 0]

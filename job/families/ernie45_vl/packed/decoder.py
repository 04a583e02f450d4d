"""Generation with a key-value cache of fixed size, for rows that start and end at different times.

Prompts are computed packed, images included; afterwards each step computes one token per row. No
step waits for the device: it chooses the tokens and counts each row's itself. Shapes are few on a
GPU, so that a step can be captured as a graph: rows that are free are computed like others, and
stored tokens that a row does not have are masked.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from job.families.batches import PackedBatch, to_device
from job.families.encoded import Encoded
from job.families.ernie45_vl.packed.batch import pack_prompts
from job.families.ernie45_vl.packed.decode_graphs import Shapes, StepGraphs
from job.families.ernie45_vl.packed.decode_layers import DecodeLayer, normed, stacked_bytes
from job.families.ernie45_vl.packed.model import PackedErnie
from job.families.ernie45_vl.packed.varlen_attention import PackedSequences, attention
from job.families.gpu_memory import free_gpu_memory
from job.families.lookahead import computed_ahead

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor

PREFILL_TOKENS = 4096
"""Prompt tokens that are computed at once: enough to be as fast as more would be, few enough that
their memory is bounded and a GPU computes them while the next prompts' images are decoded."""
PREFILL_THREADS = 4
"""Threads that decode images on behalf of a GPU."""
STACKED_SHARE = 4
"""Weights are copied to stack them only if this many times their memory is free."""


class PackedDecoder:
    """Implements `job.families.base.Decoder`.

    `fixed_shapes` is for tests: by default shapes are fixed on GPUs only.
    """

    def __init__(
        self,
        model: PackedErnie,
        processor: "Ernie4_5_VLMoeProcessor",
        *,
        slots: int,
        capacity: int,
        fixed_shapes: bool | None = None,
    ) -> None:
        on_gpu = model.device.type == "cuda"
        fixed_shapes = on_gpu if fixed_shapes is None else fixed_shapes
        self.slots = slots
        self._model, self._processor = model, processor
        self._shapes = Shapes.of(rows=slots, capacity=capacity) if fixed_shapes else None
        capacity = self._shapes.lengths[-1] if self._shapes is not None else capacity
        self._cache = _Cache.of(model, slots=slots, capacity=capacity)
        layers = model.model.language_model.layers
        needed = STACKED_SHARE * stacked_bytes(layers)
        stack = not on_gpu or free_gpu_memory(model.device) > needed
        self._layers = [DecodeLayer(layer, stack=stack) for layer in layers]
        self._lengths: list[int] = []  # tokens in the cache, by row
        # Of all slots: each one's last token, the tokens in the cache (0 in free ones), and the
        # M-RoPE position of the last token.
        self._state = torch.zeros(3, slots, dtype=torch.long, device=model.device)
        self.graphs = StepGraphs() if on_gpu and fixed_shapes else None

    @property
    def tokens(self) -> torch.Tensor:
        return self._state[0, : len(self._lengths)]

    def prefill(self, prompts: Sequence[Encoded]) -> torch.Tensor:
        assert len(self._lengths) + len(prompts) <= self.slots
        groups = _groups(prompts, PREFILL_TOKENS)
        on_gpu = self._model.device.type == "cuda"
        threads = min(PREFILL_THREADS, len(groups)) if on_gpu else 0

        def packed(group: Sequence[Encoded]) -> PackedBatch:
            return pack_prompts(group, self._processor)

        logits = [
            self._prefill(batch, [len(prompt.input_ids) for prompt in group])
            for group, batch in zip(
                groups, computed_ahead(packed, groups, threads=threads), strict=True
            )
        ]
        return torch.cat(logits)  # (N, V)

    def _prefill(self, packed: PackedBatch, lengths: list[int]) -> torch.Tensor:
        first = len(self._lengths)
        last = packed["supervised"]
        # A prompt ends with text, whose time, height and width positions are equal.
        following = packed["position_ids"][0, 0, last] + 1  # (N,)
        device = self._model.device
        batch = to_device(packed, device)
        rows = self._model.sequences(batch, "row")
        slots = torch.cat(
            [
                torch.arange(length) + (first + row) * self._cache.capacity
                for row, length in enumerate(lengths)
            ]
        )  # (T,): where each token is stored
        prompts = _Prompts(cache=self._cache, sequences=rows, slots=slots.to(device))
        hidden, _ = self._model.hidden_states(batch, prompts)
        logits: torch.Tensor = self._model.lm_head(hidden)  # (N, V)
        self._lengths += lengths
        state = self._state[:, first : len(self._lengths)]
        state[0] = logits.argmax(-1)
        state[1:] = torch.stack([torch.tensor(lengths), following]).to(device)
        return logits

    def step(self) -> torch.Tensor:
        rows, longest = len(self._lengths), max(self._lengths) + 1
        shape = self._shapes.fitting(rows, longest) if self._shapes else (rows, longest)
        logits = self._step(*shape) if self.graphs is None else self.graphs(self._step, *shape)
        self._lengths = [length + 1 for length in self._lengths]
        return logits[:rows]  # (B, V)

    def _step(self, rows: int, visible: int) -> torch.Tensor:
        """Logits (rows, V) of the first slots, whose tokens attend to `visible` stored ones."""
        text = self._model.model.language_model
        tokens, lengths, positions = self._state[:, :rows]  # (rows,) each
        hidden = text.embed_tokens(tokens)  # (rows, H)
        cos, sin = text.rotary_emb(hidden, positions.expand(3, 1, -1))  # (1, rows, D) each
        stored = _NextTokens.of(
            self._cache,
            lengths,
            visible,
            # Both elements of a pair have the same angle.
            rotation=torch.complex(cos[0, :, ::2].float(), sin[0, :, ::2].float())[:, None],
            dtype=hidden.dtype,
        )
        with _attention_kernels(hidden.device):
            for layer in self._layers:
                hidden = layer(hidden, stored)
        logits: torch.Tensor = self._model.lm_head(normed(text.norm, hidden))  # (rows, V)
        tokens.copy_(logits.argmax(-1))
        self._state[1:, :rows] += lengths > 0
        return logits

    def drop(self, row: int) -> None:
        last = len(self._lengths) - 1
        if row != last:
            self._cache.stored[:, :, row] = self._cache.stored[:, :, last]
            self._state[:, row] = self._state[:, last]
            self._lengths[row] = self._lengths[last]
        self._state[1:, last] = 0
        self._lengths.pop()


def _attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """A context in which attention takes a mask, and prepares nothing on the host at each call, as
    cuDNN's does."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return context


def _groups(prompts: Sequence[Encoded], tokens: int) -> list[Sequence[Encoded]]:
    """Consecutive prompts with at most `tokens` tokens in a group, or one longer prompt."""
    groups: list[list[Encoded]] = []
    filled = 0
    for prompt in prompts:
        length = len(prompt.input_ids)
        if not groups or filled + length > tokens:
            groups.append([])
            filled = 0
        groups[-1].append(prompt)
        filled += length
    return list(groups)


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """Keys and values of all layers."""

    stored: torch.Tensor
    """(layers, 2, slots, capacity, heads, D): keys, then values."""

    @classmethod
    def of(cls, model: PackedErnie, *, slots: int, capacity: int) -> "_Cache":
        text = model.model.language_model
        attn = text.layers[0].self_attn
        dtype = attn.k_proj.weight.dtype
        heads = model.config.text_config.num_key_value_heads
        shape = (len(text.layers), 2, slots, capacity, heads, attn.head_dim)
        return cls(stored=torch.zeros(shape, dtype=dtype, device=model.device))

    @property
    def capacity(self) -> int:
        return self.stored.shape[3]

    def store(self, layer: int, indices: torch.Tensor, *both: torch.Tensor) -> None:
        """Keeps keys and values (T, heads, D) at these indices (T,): slot · capacity + token."""
        for stored, new in zip(self.stored[layer], both, strict=True):
            stored.flatten(0, 1).index_copy_(0, indices, new)


@dataclass(frozen=True, kw_only=True)
class _Prompts:
    """Prompts that are computed whole."""

    cache: _Cache
    sequences: PackedSequences
    slots: torch.Tensor
    """(T,): where each token is stored."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.cache.store(layer, self.slots, key, value)
        return attention(query, key, value, self.sequences, causal=True, scale=scale)


@dataclass(frozen=True, kw_only=True)
class _NextTokens:
    """One token of each of the first B slots; implements `decode_layers.StoredTokens`."""

    cache: _Cache
    rotation: torch.Tensor
    slots: torch.Tensor
    """(B,): where each token is stored."""
    bias: torch.Tensor
    """(B, 1, 1, L): 0 for a slot's tokens, else minus infinity."""

    @classmethod
    def of(
        cls,
        cache: _Cache,
        lengths: torch.Tensor,
        visible: int,
        *,
        rotation: torch.Tensor,
        dtype: torch.dtype,
    ) -> "_NextTokens":
        """After `lengths` (B,) tokens in the cache, of which `visible` are read."""
        device = lengths.device
        first = torch.arange(len(lengths), device=device) * cache.capacity
        hidden = torch.arange(visible, device=device) > lengths[:, None]  # (B, L)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        bias.masked_fill_(hidden, -torch.inf)
        return cls(cache=cache, rotation=rotation, slots=first + lengths, bias=bias[:, None, None])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.cache.store(layer, self.slots, key, value)
        rows, heads, visible = len(query), key.shape[1], self.bias.shape[-1]
        keys, values = self.cache.stored[layer, :, :rows, :visible].transpose(2, 3)
        # The query heads that share a key head stand as tokens of it, so that nothing is repeated.
        queries = query.unflatten(1, (heads, -1))  # (B, heads, group, D)
        out = scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=self.bias.expand(-1, heads, queries.shape[2], -1),
            scale=scale,
        )
        return out.flatten(1)

"""What a training step of ERNIE-4.5-VL keeps for its backward pass, worked out from the shapes.

The rules that all of it follows from:

- A linear layer keeps its input only where something needs it: its own weight, or an adapter on it,
  is trained. A frozen one keeps nothing, as its backward pass needs its weight alone.
- Nothing is kept before the first trained weight: no gradient goes there.
- A normalisation keeps its input in fp32, a product both its factors, an attention kernel its
  query, key, value and output, and the cross-entropy the log-probabilities in fp32.
- Under autocast each trained layer casts its input by itself, so that each has a copy of its own.

Tests hold the sums against the tensors that real steps keep.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from job.families.base import BY_BOUNDS, SORTED_EXPERTS, RowSize, Saved, Step
from job.families.ernie45_vl.packed.expert_lora import RANKS
from job.families.loss import CHUNK

FP32, INDEX = 4, 8


def saved(config: Any, trained: Collection[str], rows: Sequence[RowSize], step: Step) -> Saved:
    """Bytes that one forward pass over the rows keeps, and that its backward pass adds to them.

    `config` is the nested one; `trained` names the modules and parameters that are trained or
    adapted.
    """
    walk = _Walk(config, frozenset(trained), rows, step)
    return walk.saved()


class _Walk:
    """Through the step in its order, noting what each piece keeps."""

    def __init__(
        self, config: Any, trained: frozenset[str], rows: Sequence[RowSize], step: Step
    ) -> None:
        self.text, self.vision = config.text_config, config.vision_config
        self.trained, self.rows, self.step = trained, rows, step
        self.live = False
        """Whether a gradient will come back to here."""
        self.kept: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        """The block that keeps most: what checkpointing makes again, one block at a time."""
        self.longest = max(row.tokens for row in rows)
        self.patches = [count for row in rows for count in row.patches]
        grid = len(rows) * self.longest
        seen = sum(row.image_tokens for row in rows)
        # Padding counts as text; without it there is none.
        self.tokens = sum(row.tokens for row in rows) if step.packed else grid
        self.by_experts = {"text_moe": self.tokens - seen, "vision_moe": seen}

    def saved(self) -> Saved:
        if self.patches:
            self._pictures()
        self._language()
        logits, log_probabilities = self._head()
        return Saved(
            activations=self.kept["activations"],
            attention=self.kept["attention"],
            log_probabilities=log_probabilities,
            logits=logits,
            made_again=self.largest.total() if self.step.checkpointing else 0,
            working=self._working(),
        )

    # --- the pieces ------------------------------------------------------------------------

    def _pictures(self) -> None:
        tower, merge = self.vision, self.vision.spatial_merge_size**2
        count, wide = sum(self.patches), tower.hidden_size
        self._projections(["model.vision_tower.patch_embed.proj"], count, self._pixels())
        for number in range(tower.depth):
            name = f"model.vision_tower.blocks.{number}"
            before = self._enter()
            self._layer_norm(count, wide)
            self._projections([f"{name}.attn.qkv"], count, wide)
            held = self._attend_to_patches(count, wide)
            self._projections([f"{name}.attn.proj"], count, wide, held=held)
            self._layer_norm(count, wide)
            self._projections([f"{name}.mlp.fc1"], count, wide)
            # x · sigmoid(1.702 x): both factors.
            self._keep("activations", 2 * count * tower.intermediate_size)
            self._projections([f"{name}.mlp.fc2"], count, tower.intermediate_size)
            self._leave(before, count * wide)
        self._layer_norm(count, wide)
        images, joined = count // merge, wide * merge
        for half, wide_in in (("spatial", joined), ("temporal", 2 * joined)):
            name = f"model.resampler_model.{half}_linear"
            self._projections([f"{name}.fc1"], images, wide_in)
            self._keep("activations", images * joined)  # GELU keeps its input
            self._projections([f"{name}.fc2"], images, joined)
            self._layer_norm(images, joined)
        self._projections(["model.resampler_model.mlp"], images, joined)
        self._rms_norm(images)
        self._keep("activations", images * self.text.hidden_size)  # what is put among the tokens

    def _attend_to_patches(self, count: int, wide: int) -> bool:
        """Gives whether the output projection's input is the kept output itself."""
        heads = self.vision.num_heads
        if self.step.attention == "eager":
            self._keep("attention", 5 * count * wide)
            self._probabilities(heads * sum(n * n for n in self.patches))
            return False
        whole = self.step.attention == BY_BOUNDS  # never a grid
        grid = count if whole else len(self.patches) * max(self.patches)
        padded = grid != count  # images of unequal sizes: copies in a padded grid
        if self.step.packed or not padded:
            # Query and key after their rotation; the value is a view of all three before it.
            self._keep("attention", 5 * count * wide)
        if padded:
            self._keep("attention", 3 * grid * wide)
        self._keep("attention", grid * wide)  # the output
        self._keep("attention", grid * heads, FP32)  # and each row's scale
        return not padded

    def _language(self) -> None:
        text, tokens = self.text, self.tokens
        wide, head = text.hidden_size, head_dim(text)
        every, by_experts = tokens, self.by_experts
        for number, kind in enumerate(text.mlp_layer_types):
            name = f"model.language_model.layers.{number}"
            before = self._enter()
            self._rms_norm(tokens)
            attention = f"{name}.self_attn"
            self._projections([f"{attention}.{x}_proj" for x in "qkv"], tokens, wide)
            held = self._attend_to_tokens()
            heads = text.num_attention_heads * head
            if number == len(text.mlp_layer_types) - 1 and self._ends_early(name):
                held, tokens = False, self._supervised_alone()
            self._projections([f"{attention}.o_proj"], tokens, heads, held=held)
            self._rms_norm(tokens)
            if kind == "dense":
                self._gated_mlp(f"{name}.mlp", text.intermediate_size)
            else:
                self._experts(f"{name}.mlp")
                shared = text.moe_intermediate_size[0] * text.moe_num_shared_experts
                if shared:
                    self._gated_mlp(f"{name}.mlp.shared_experts", shared)
            self._leave(before, every * wide)
        self.tokens, self.by_experts = every, by_experts
        self._keep("activations", 2 * every * head, FP32)  # cosine and sine, one pair for all
        self._rms_norm(tokens)

    def _ends_early(self, last: str) -> bool:
        """Whether the last layer goes on with supervised tokens alone; see `packed.model`."""
        pictured = f"{last}.mlp.vision_moe"
        return self.step.packed and not any(name.startswith(pictured) for name in self.trained)

    def _supervised_alone(self) -> int:
        self.tokens = sum(row.trained for row in self.rows)
        self.by_experts = {"text_moe": self.tokens, "vision_moe": 0}
        return self.tokens

    def _attend_to_tokens(self) -> bool:
        """Gives whether the output projection's input is the kept output itself."""
        text, step = self.text, self.step
        head = head_dim(text)
        queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
        tokens = sum(row.tokens for row in self.rows)
        grid = tokens if step.attention == BY_BOUNDS else len(self.rows) * self.longest
        padded = grid != tokens
        if step.attention == "eager":
            self._probabilities(text.num_attention_heads * len(self.rows) * self.longest**2)
            self._keep("attention", 3 * grid * queries)  # keys and values repeated for all heads
            return False
        if step.packed:
            if padded:  # rows of unequal length: copies in a padded grid
                self._keep("attention", self.tokens * (queries + 2 * keys))
            self._keep("attention", grid * (2 * queries + 2 * keys))
        else:
            # With a mask kernels take as many keys as queries.
            repeated = queries if padded else keys
            self._keep("attention", grid * (2 * queries + 2 * repeated))
        self._keep("attention", grid * text.num_attention_heads, FP32)
        return not (step.packed and padded)

    def _experts(self, name: str) -> None:
        text, step = self.text, self.step
        wide, chosen = text.hidden_size, text.moe_k
        if not step.packed:  # two masks as wide as the hidden states tell the modalities apart
            self._keep("activations", 2 * self.tokens * wide, 1)
        for kind, inner in zip(self.by_experts, text.moe_intermediate_size, strict=True):
            count = self.by_experts[kind]
            if not count:
                continue
            stem = f"{name}.{kind}.experts"
            copies = count * chosen
            up, down = (f"{stem}.{x}_proj" in self.trained for x in ("gate_up", "down"))
            if f"{name}.{kind}.gate.weight" in self.trained:
                self._keep("activations", count * wide, FP32)
            self.live = self.live or up or down
            self._keep("activations", count * (text.moe_num_experts + 3 * chosen), FP32)  # routing
            self._keep("activations", 3 * copies, INDEX)  # which copy goes where, and back
            own = step.experts == SORTED_EXPERTS
            # Gate and up in one tensor, and the activated gate; then what the router learns by:
            # the product of both, or what comes out.
            self._keep("activations", copies * (4 * inner if own else 3 * inner + wide))
            if step.experts == "eager":  # adding up keeps what it adds
                self._keep("activations", copies * wide)
            weights = text.moe_num_experts * wide * inner
            for on, inputs, size in ((up, wide, 2 * weights), (down, inner, weights)):
                if on:
                    self._keep("activations", copies * inputs)
                    if step.rank and own and step.packed:
                        self._keep("activations", copies * (step.rank + -step.rank % RANKS))
                    elif step.rank:  # PEFT adds the product to a copy of all experts' weights
                        self._keep("activations", size)

    def _gated_mlp(self, name: str, inner: int) -> None:
        self._projections(
            [f"{name}.gate_proj", f"{name}.up_proj"], self.tokens, self.text.hidden_size
        )
        # The gate before and after its activation, and what it is multiplied by.
        self._keep("activations", 3 * self.tokens * inner)
        self._projections([f"{name}.down_proj"], self.tokens, inner)

    def _head(self) -> tuple[int, int]:
        """The bytes of logits at their peak, and those of them that are kept from the forward pass.

        Log-probabilities are kept; the loss's gradient by them, and by the logits, come beside them
        before any layer's backward pass has freed a thing.
        """
        step, supervised = self.step, sum(row.trained for row in self.rows)
        trained = "lm_head" in self.trained
        held = (min(supervised, CHUNK) if step.packed else self.tokens) * self.text.vocab_size
        if trained or step.packed:  # its input, or the gradient that is made along
            self._keep("activations", supervised * self.text.hidden_size)
        if step.packed and not trained:
            return (FP32 + step.width) * held, 0
        chunked = step.packed and supervised > CHUNK
        return 3 * FP32 * held, 0 if chunked else FP32 * held

    def _working(self) -> int:
        """The temporary tensors of the widest layer's backward pass.

        The gradients of routed copies on both sides of the experts, and of gate and up; beside them
        lie the batch's pixels.
        """
        text = self.text
        routed = (
            self.tokens * text.moe_k * (3 * text.hidden_size + 4 * max(text.moe_intermediate_size))
        )
        dense = self.tokens * (3 * text.hidden_size + 4 * text.intermediate_size)
        return max(routed, dense) * self.step.width + sum(self.patches) * self._pixels() * FP32

    def _pixels(self) -> int:
        return int(self.vision.in_channels * self.vision.patch_size**2)

    # --- what they are made of -------------------------------------------------------------

    def _enter(self) -> Counter[str]:
        return Counter(self.kept)

    def _leave(self, before: Counter[str], input_size: int) -> None:
        """Ends a block: with checkpointing its input is all that stays of it."""
        block = self.kept - before
        if self.step.checkpointing and block:
            self.largest = max(self.largest, block, key=Counter.total)
            self.kept = before
            self._keep("activations", input_size)

    def _keep(self, part: str, count: int, width: int | None = None) -> None:
        if self.live:
            self.kept[part] += count * (self.step.width if width is None else width)

    def _projections(
        self, names: Sequence[str], tokens: int, wide: int, *, held: bool = False
    ) -> None:
        """Linear layers on one input, which something else has kept already where it is `held`."""
        step, trained = self.step, sum(name in self.trained for name in names)
        if not trained:
            return
        self.live = True
        # PEFT's adapter is fp32. Where autocast does not bring its input back, that is cast to it.
        by_peft = step.rank and not step.own_layers
        width = FP32 if by_peft and not step.autocast else step.width
        apart = step.autocast or step.dropout > 0 or width != step.width
        self._keep("activations", (trained if apart else not held) * tokens * wide, width)
        self._keep("activations", trained * tokens * step.rank, width)  # between its two matrices
        if step.dropout:
            self._keep("activations", trained * tokens * wide, step.dropout)

    def _probabilities(self, count: int) -> None:
        """Of eager attention: in fp32, and cast to what the values are multiplied in."""
        cast = self.step.width if self.step.width != FP32 else 0
        self._keep("attention", count, FP32 + cast)

    def _rms_norm(self, tokens: int) -> None:
        self._keep("activations", tokens * (self.text.hidden_size + 1), FP32)
        if not self.step.rank:  # its own weight is trained: what that is multiplied by
            self._keep("activations", tokens * self.text.hidden_size)

    def _layer_norm(self, tokens: int, wide: int) -> None:
        # Autocast computes it in fp32, of a copy.
        self._keep("activations", tokens * wide, FP32 if self.step.autocast else None)
        self._keep("activations", 2 * tokens, FP32)


def head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

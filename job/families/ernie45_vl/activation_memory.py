"""Estimates the activation memory of an ERNIE-4.5-VL training step from shapes.

The rules:

- A linear layer saves its input only if its weight, or an adapter on it, is trained. The backward
  pass of a frozen layer needs only its weight.
- Nothing is saved before the first trained weight, because no gradient flows there.
- A norm saves its input in fp32; a product, both factors; an attention kernel, its query, key,
  value and output; the cross-entropy, the log-probabilities in fp32.
- Under autocast, each trained layer casts its input separately, and saves its own copy.

Tests compare the sums with the tensors that real steps save.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from job.families.activation_memory import VARLEN, ActivationMemory, StepSettings
from job.families.base import SORTED_EXPERTS
from job.families.encoded import RowSize
from job.families.ernie45_vl.packed.expert_lora import RANK_MULTIPLE
from job.families.loss import CHUNK

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeTextConfig

FP32, INDEX = 4, 8
"""Bytes of an fp32 element, and of an int64 index."""


def activation_memory(
    config: "Ernie4_5_VLMoeConfig",
    trained: Collection[str],
    rows: Sequence[RowSize],
    step: StepSettings,
) -> ActivationMemory:
    """The memory that the forward pass over the rows saves, and that its backward pass adds.

    `trained` names the modules and parameters that are trained or adapted.
    """
    return _Step(config, frozenset(trained), rows, step).memory()


class _Step:
    """Walks through a step, and adds up the bytes that each part saves."""

    def __init__(
        self,
        config: "Ernie4_5_VLMoeConfig",
        trained: frozenset[str],
        rows: Sequence[RowSize],
        step: StepSettings,
    ) -> None:
        self.text, self.vision = config.text_config, config.vision_config
        self.trained, self.rows, self.step = trained, rows, step
        self.needs_gradient = False
        """Whether the backward pass reaches the part that is currently walked through."""
        self.saved: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        """The block that saves the most; checkpointing recomputes one block at a time."""
        self.longest = max(row.tokens for row in rows)
        self.patches = [count for row in rows for count in row.patches]
        grid = len(rows) * self.longest
        vision = sum(row.image_tokens for row in rows)
        # Padding tokens are routed to the text experts.
        self.tokens = sum(row.tokens for row in rows) if step.packed else grid
        self.by_experts = {"text_moe": self.tokens - vision, "vision_moe": vision}

    def memory(self) -> ActivationMemory:
        if self.patches:
            self._vision_tower()
            self._resampler()
        self._decoder()
        logits, log_probabilities = self._head()
        return ActivationMemory(
            activations=self.saved["activations"],
            attention=self.saved["attention"],
            log_probabilities=log_probabilities,
            logits=logits,
            recomputed=self.largest.total() if self.step.checkpointing else 0,
            workspace=self._workspace(),
        )

    # --- the parts of the model ------------------------------------------------------------

    def _vision_tower(self) -> None:
        tower, count = self.vision, sum(self.patches)
        hidden = tower.hidden_size
        self._linear(["model.vision_tower.patch_embed.proj"], count, self._patch_size())
        for number in range(tower.depth):
            name = f"model.vision_tower.blocks.{number}"
            before = self._begin_block()
            self._layer_norm(count, hidden)
            self._linear([f"{name}.attn.qkv"], count, hidden)
            input_saved = self._vision_attention(count, hidden)
            self._linear([f"{name}.attn.proj"], count, hidden, input_saved=input_saved)
            self._layer_norm(count, hidden)
            self._linear([f"{name}.mlp.fc1"], count, hidden)
            # x · sigmoid(1.702 x): both factors.
            self._save("activations", 2 * count * tower.intermediate_size)
            self._linear([f"{name}.mlp.fc2"], count, tower.intermediate_size)
            self._end_block(before, count * hidden)
        self._layer_norm(count, hidden)

    def _resampler(self) -> None:
        merge = self.vision.spatial_merge_size**2
        tokens, merged = sum(self.patches) // merge, self.vision.hidden_size * merge
        for part, inputs in (("spatial", merged), ("temporal", 2 * merged)):
            name = f"model.resampler_model.{part}_linear"
            self._linear([f"{name}.fc1"], tokens, inputs)
            self._save("activations", tokens * merged)  # GELU saves its input
            self._linear([f"{name}.fc2"], tokens, merged)
            self._layer_norm(tokens, merged)
        self._linear(["model.resampler_model.mlp"], tokens, merged)
        self._rms_norm(tokens)
        self._save("activations", tokens * self.text.hidden_size)  # image embeddings

    def _vision_attention(self, count: int, hidden: int) -> bool:
        """Returns whether the output projection's input is saved already, as attention's output."""
        heads = self.vision.num_heads
        if self.step.attention == "eager":
            self._save("attention", 5 * count * hidden)
            self._attention_probabilities(heads * sum(n * n for n in self.patches))
            return False
        varlen = self.step.attention == VARLEN  # never pads
        grid = count if varlen else len(self.patches) * max(self.patches)
        padded = grid != count  # images of unequal sizes: copies in a padded grid
        if self.step.packed or not padded:
            # Query and key after RoPE; the value is a view of all three before it.
            self._save("attention", 5 * count * hidden)
        if padded:
            self._save("attention", 3 * grid * hidden)
        self._save("attention", grid * hidden)  # the output
        self._save("attention", grid * heads, FP32)  # the log-sum-exp of each row
        return not padded

    def _decoder(self) -> None:
        text, tokens = self.text, self.tokens
        hidden, head = text.hidden_size, head_dim(text)
        every, by_experts = tokens, self.by_experts
        for number, kind in enumerate(text.mlp_layer_types):
            name = f"model.language_model.layers.{number}"
            before = self._begin_block()
            self._rms_norm(tokens)
            attention = f"{name}.self_attn"
            self._linear([f"{attention}.{x}_proj" for x in "qkv"], tokens, hidden)
            input_saved = self._causal_attention()
            heads = text.num_attention_heads * head
            if number == len(text.mlp_layer_types) - 1 and self._skips_unsupervised(name):
                input_saved, tokens = False, self._keep_supervised()
            self._linear([f"{attention}.o_proj"], tokens, heads, input_saved=input_saved)
            self._rms_norm(tokens)
            if kind == "dense":
                self._feed_forward(f"{name}.mlp", text.intermediate_size)
            else:
                self._routed_experts(f"{name}.mlp")
                shared = text.moe_intermediate_size[0] * text.moe_num_shared_experts
                if shared:
                    self._feed_forward(f"{name}.mlp.shared_experts", shared)
            self._end_block(before, every * hidden)
        self.tokens, self.by_experts = every, by_experts
        self._save("activations", 2 * every * head, FP32)  # cos and sin, shared by all layers
        self._rms_norm(tokens)

    def _skips_unsupervised(self, last: str) -> bool:
        """Whether the last layer computes only supervised tokens; see `packed.model`."""
        vision = f"{last}.mlp.vision_moe"
        return self.step.packed and not any(name.startswith(vision) for name in self.trained)

    def _keep_supervised(self) -> int:
        self.tokens = sum(row.supervised_tokens for row in self.rows)
        self.by_experts = {"text_moe": self.tokens, "vision_moe": 0}
        return self.tokens

    def _causal_attention(self) -> bool:
        """Returns whether the output projection's input is saved already, as attention's output."""
        text, step = self.text, self.step
        head = head_dim(text)
        queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
        tokens = sum(row.tokens for row in self.rows)
        grid = tokens if step.attention == VARLEN else len(self.rows) * self.longest
        padded = grid != tokens
        if step.attention == "eager":
            self._attention_probabilities(
                text.num_attention_heads * len(self.rows) * self.longest**2
            )
            self._save("attention", 3 * grid * queries)  # keys and values repeated for all heads
            return False
        if step.packed:
            if padded:  # rows of unequal length: copies in a padded grid
                self._save("attention", self.tokens * (queries + 2 * keys))
            self._save("attention", grid * (2 * queries + 2 * keys))
        else:
            # With a mask, kernels need as many key heads as query heads.
            repeated = queries if padded else keys
            self._save("attention", grid * (2 * queries + 2 * repeated))
        self._save("attention", grid * text.num_attention_heads, FP32)
        return not (step.packed and padded)

    def _routed_experts(self, name: str) -> None:
        text, step = self.text, self.step
        hidden, k = text.hidden_size, text.moe_k
        if not step.packed:  # two masks as wide as the hidden states select the modalities
            self._save("activations", 2 * self.tokens * hidden, 1)
        for modality, inner in zip(self.by_experts, text.moe_intermediate_size, strict=True):
            count = self.by_experts[modality]
            if not count:
                continue
            stem = f"{name}.{modality}.experts"
            copies = count * k
            up, down = (f"{stem}.{x}_proj" in self.trained for x in ("gate_up", "down"))
            if f"{name}.{modality}.gate.weight" in self.trained:
                self._save("activations", count * hidden, FP32)
            self.needs_gradient = self.needs_gradient or up or down
            self._save("activations", count * (text.moe_num_experts + 3 * k), FP32)  # routing
            self._save("activations", 3 * copies, INDEX)  # the order of copies, and its inverse
            ours = step.experts == SORTED_EXPERTS
            # Gate and up in one tensor, and the activated gate; then, for the routing weight's
            # gradient, the product of both or the output.
            self._save("activations", copies * (4 * inner if ours else 3 * inner + hidden))
            if step.experts == "eager":  # the sum over experts saves each expert's output
                self._save("activations", copies * hidden)
            weights = text.moe_num_experts * hidden * inner
            for adapted, inputs, size, ranks in (
                (up, hidden, 2 * weights, step.gate_up_adapters * step.rank),
                (down, inner, weights, step.rank),
            ):
                if adapted:
                    self._save("activations", copies * inputs)
                    if step.rank and ours and step.packed:
                        rank = ranks + -ranks % RANK_MULTIPLE
                        self._save("activations", copies * rank)
                    elif step.rank:  # PEFT adds the product to a copy of all experts' weights
                        self._save("activations", size)

    def _feed_forward(self, name: str, inner: int) -> None:
        self._linear([f"{name}.gate_proj", f"{name}.up_proj"], self.tokens, self.text.hidden_size)
        # The gate before and after its activation, and up.
        self._save("activations", 3 * self.tokens * inner)
        self._linear([f"{name}.down_proj"], self.tokens, inner)

    def _head(self) -> tuple[int, int]:
        """The peak bytes of the logits, and the bytes that the forward pass saves of them.

        Log-probabilities are saved; their gradient and that of the logits are added before the
        backward pass of any layer frees memory.
        """
        step, supervised = self.step, sum(row.supervised_tokens for row in self.rows)
        trained = "lm_head" in self.trained
        logits = (min(supervised, CHUNK) if step.packed else self.tokens) * self.text.vocab_size
        if trained or step.packed:  # its input, or the gradient computed in the forward pass
            self._save("activations", supervised * self.text.hidden_size)
        if step.packed and not trained:
            return (FP32 + step.itemsize) * logits, 0
        chunked = step.packed and supervised > CHUNK
        return 3 * FP32 * logits, 0 if chunked else FP32 * logits

    def _workspace(self) -> int:
        """The temporary tensors of the largest layer's backward pass.

        Gradients of the routed copies, before and after the experts, and of gate and up; also the
        batch's pixels.
        """
        text = self.text
        routed = (
            self.tokens * text.moe_k * (3 * text.hidden_size + 4 * max(text.moe_intermediate_size))
        )
        dense = self.tokens * (3 * text.hidden_size + 4 * text.intermediate_size)
        pixels = sum(self.patches) * self._patch_size() * FP32
        return max(routed, dense) * self.step.itemsize + pixels

    def _patch_size(self) -> int:
        return int(self.vision.in_channels * self.vision.patch_size**2)

    # --- the operations --------------------------------------------------------------------

    def _begin_block(self) -> Counter[str]:
        return Counter(self.saved)

    def _end_block(self, before: Counter[str], input_size: int) -> None:
        """With checkpointing, only a block's input is saved."""
        block = self.saved - before
        if self.step.checkpointing and block:
            self.largest = max(self.largest, block, key=Counter.total)
            self.saved = before
            self._save("activations", input_size)

    def _save(self, part: str, count: int, itemsize: int | None = None) -> None:
        if self.needs_gradient:
            self.saved[part] += count * (self.step.itemsize if itemsize is None else itemsize)

    def _linear(
        self, names: Sequence[str], tokens: int, inputs: int, *, input_saved: bool = False
    ) -> None:
        """Linear layers on one input, which the previous operation may have saved already."""
        step, trained = self.step, sum(name in self.trained for name in names)
        if not trained:
            return
        self.needs_gradient = True
        # PEFT's adapter is fp32, and without autocast its input is cast to that.
        by_peft = step.rank and not step.lora_linear
        itemsize = FP32 if by_peft and not step.autocast else step.itemsize
        copies = step.autocast or step.dropout > 0 or itemsize != step.itemsize
        self._save(
            "activations", (trained if copies else not input_saved) * tokens * inputs, itemsize
        )
        self._save("activations", trained * tokens * step.rank, itemsize)  # between its matrices
        if step.dropout:
            self._save("activations", trained * tokens * inputs, step.dropout)

    def _attention_probabilities(self, count: int) -> None:
        """Eager attention saves them in fp32, and cast to the dtype of the values."""
        cast = self.step.itemsize if self.step.itemsize != FP32 else 0
        self._save("attention", count, FP32 + cast)

    def _rms_norm(self, tokens: int) -> None:
        self._save("activations", tokens * (self.text.hidden_size + 1), FP32)
        if not self.step.rank:  # full fine-tuning trains the weight, which saves its other factor
            self._save("activations", tokens * self.text.hidden_size)

    def _layer_norm(self, tokens: int, hidden: int) -> None:
        # Autocast computes it in fp32, from a copy.
        self._save("activations", tokens * hidden, FP32 if self.step.autocast else None)
        self._save("activations", 2 * tokens, FP32)


def head_dim(text: "Ernie4_5_VLMoeTextConfig") -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

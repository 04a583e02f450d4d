"""The forward pass over a packed batch, as a subclass of Transformers' model.

T tokens in all rows, S of them supervised; H is the hidden size.
"""

import functools
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.batches import PackedBatch, PatchInputs
from job.families.class_swap import swap_class
from job.families.ernie45_vl.image_processing import normalized
from job.families.ernie45_vl.packed.experts import Modalities
from job.families.ernie45_vl.packed.layers import CachedSequences, use_packed_layers
from job.families.ernie45_vl.packed.rope import RotaryAngles, swap_halves, swap_neighbors
from job.families.ernie45_vl.packed.varlen_attention import (
    PackedSequences,
    gather,
)
from job.families.ernie45_vl.packed.varlen_trial import serves
from job.families.loss import supervised_loss

if TYPE_CHECKING:
    from peft import PeftModel


class _LayerTokens(TypedDict, total=False):
    """Arguments of a decoder layer: for which tokens it computes the output."""

    modalities: Modalities
    output_indices: torch.Tensor
    output_router_logits: bool


class PackedErnie(native.Ernie4_5_VLMoeForConditionalGeneration):
    """Accepts batches of `packed.batch.pack`; for other batches it behaves like its parent."""

    varlen: bool
    """Whether attention may use the variable-length kernel."""

    # Generation inspects the signature.
    @functools.wraps(native.Ernie4_5_VLMoeForConditionalGeneration.forward)
    def forward(
        self,
        *args: object,
        targets: torch.Tensor | None = None,
        returns_logits: bool = False,
        **inputs: object,
    ) -> native.MoeCausalLMOutputWithPast:
        """The loss of a packed batch; or instead, if asked for, its logits (1, S, V)."""
        if targets is None:
            return super().forward(*args, **inputs)
        batch = cast(PackedBatch, inputs)
        rows = self.sequences(batch, "row")
        hidden, router_logits = self.hidden_states(batch, rows)
        if returns_logits:
            return native.MoeCausalLMOutputWithPast(logits=self.lm_head(hidden)[None])
        loss = supervised_loss(hidden, targets, self.lm_head)
        aux = None
        if self.config.text_config.output_router_logits:
            # Without a mask, the function would sync with the device.
            mask = batch.get("token_mask", batch["input_ids"][0].new_ones((), dtype=torch.bool))
            grouped = _modalities(batch, "token").grouped  # the order of the logits
            mask = mask.expand(len(grouped))[grouped]  # (T,)
            aux = native.load_balancing_loss_func(
                router_logits, self.num_experts, self.num_experts_per_tok, mask
            )
            loss = loss + self.router_aux_loss_coef * aux
        return native.MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux)

    def hidden_states(
        self, batch: PackedBatch, rows: PackedSequences | CachedSequences
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The final hidden states (S, H) of the supervised tokens, and each sparse layer's router
        logits (T, experts); none unless the configuration asks for them, as the auxiliary loss
        does."""
        text = self.model.language_model
        hidden = text.embed_tokens(batch["input_ids"])[0]  # (T, H)
        if "pixels" in batch:
            images = self._image_embeddings(batch).to(hidden.dtype)  # (merged patches, H)
            if "image_token_sources" in batch:
                images = images[batch["image_token_sources"]]  # (image tokens, H)
            hidden = hidden.index_copy(0, batch["image_token_indices"], images)
        elif isinstance(self.model.vision_tower.blocks[0], FSDPModule):
            # Gathering sharded weights is a collective, so every rank has to run the tower.
            blank = self._blank_patches(hidden.device)
            hidden = hidden + 0 * self._image_embeddings(blank).sum()
        cos, sin = text.rotary_emb(hidden, batch["position_ids"])  # (1, T, D) each
        angles = RotaryAngles.of(cos[0], sin[0], swap_neighbors)
        wanted = bool(self.config.text_config.output_router_logits)
        tokens: _LayerTokens = {
            "modalities": _modalities(batch, "token"),
            "output_router_logits": wanted,
        }
        router_logits = []
        for number, layer in enumerate(text.layers, start=1):
            if number == len(text.layers) and self._last_layer_skips_unsupervised(layer):
                tokens = {
                    "modalities": _modalities(batch, "supervised"),
                    "output_indices": batch["supervised"],
                    "output_router_logits": wanted,
                }
            hidden, logits = layer(hidden, angles, sequences=rows, **tokens)
            if logits is not None:
                router_logits.append(logits)
        if "output_indices" not in tokens:
            hidden = gather(hidden, batch["supervised"])  # (S, H)
        return text.norm(hidden), tuple(router_logits)

    def _last_layer_skips_unsupervised(self, last: native.Ernie4_5_VLMoeDecoderLayer) -> bool:
        """Whether the last layer computes only supervised tokens, because no other output is used.

        Not if the auxiliary loss needs the layer's router logits of all tokens. Nor if its vision
        experts are trained: image tokens are never supervised, so the experts' gradient would be
        None instead of zero, which optimizers treat differently.
        """
        if self.config.text_config.output_router_logits:
            return False
        vision = getattr(last.mlp, "vision_moe", None)
        return vision is None or not any(p.requires_grad for p in vision.parameters())

    def _image_embeddings(self, batch: PatchInputs) -> torch.Tensor:
        """The vision tower and the resampler, which merges patches: (image tokens, H)."""
        tower, resampler = self.model.vision_tower, self.model.resampler_model
        pixels = normalized(batch["pixels"], batch["pixel_mean"], batch["pixel_std"])
        hidden = tower.patch_embed(pixels)  # (patches, vision H)
        cos, sin = tower.rotary_pos_emb(hidden, batch["patch_position_ids"])  # (patches, D) each
        angles = RotaryAngles.of(cos, sin, swap_halves)
        images = self.sequences(batch, "patch")
        for block in tower.blocks:
            hidden = block(hidden, position_embeddings=angles, sequences=images)
        # Spatial merging: merge² adjacent patches, which are consecutive, become one token.
        hidden = tower.ln(hidden).view(-1, resampler.spatial_dim)  # (image tokens, merge² · H)
        hidden = resampler.spatial_linear(hidden)
        # Temporal merging joins two frames of a video; an image is used as both.
        hidden = resampler.temporal_linear(torch.cat([hidden, hidden], dim=-1))
        return resampler.after_norm(resampler.mlp(hidden))

    def _blank_patches(self, device: torch.device) -> PatchInputs:
        """The patches of a blank image of one token."""
        vision = self.config.vision_config
        side = vision.spatial_merge_size
        count, area = side**2, vision.in_channels * vision.patch_size**2
        index = torch.arange(count, device=device)
        return {
            "pixels": torch.zeros(count, area, dtype=torch.uint8, device=device),
            "pixel_mean": torch.zeros(area, device=device),
            "pixel_std": torch.ones(area, device=device),
            "patch_position_ids": torch.stack([index // side, index % side], dim=1),
            "patch_indices": index,
            "patch_mask": torch.ones(1, count, dtype=torch.bool, device=device),
            "patch_cu_seqlens": torch.tensor([0, count], dtype=torch.int32, device=device),
        }

    def sequences(self, batch: PatchInputs, of: Literal["row", "patch"]) -> PackedSequences:
        """The boundaries of the batch's rows or images."""
        tensors = cast("dict[str, torch.Tensor]", batch)
        indices, mask, cu_seqlens = (
            tensors[f"{of}_{part}"] for part in ("indices", "mask", "cu_seqlens")
        )
        return PackedSequences(indices, mask, cu_seqlens, varlen=self.varlen)


def _modalities(batch: PackedBatch, of: Literal["token", "supervised"]) -> Modalities:
    tensors = cast("dict[str, torch.Tensor]", batch)
    return Modalities.from_indices(
        *(tensors[f"{of}_{part}"] for part in ("text", "vision", "inverse"))
    )


def use_packed_step(model: "PreTrainedModel", *, varlen: bool = True) -> None:
    """Makes a Transformers model accept packed batches too; its weights do not change.

    `varlen` allows the variable-length attention kernel, if the device supports it.
    """
    swap_class(model, PackedErnie)
    model.varlen = varlen and serves(model.device)
    use_packed_layers(model)


def packed_base(model: "PreTrainedModel | PeftModel") -> PackedErnie | None:
    """The model, or the one inside an adapter, as one that accepts packed batches.

    None if its class is not Transformers' own, if it is sharded, or if its blocks are compiled:
    they would be compiled anew for batches of other kinds.
    """
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    native_class = native.Ernie4_5_VLMoeForConditionalGeneration
    if type(base) not in (native_class, PackedErnie) or isinstance(base, FSDPModule):
        return None
    if any(layer._compiled_call_impl is not None for layer in base.model.language_model.layers):
        return None
    if type(base) is native_class:
        use_packed_step(base)
    return base

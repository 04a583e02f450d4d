"""The model's training step over a packed batch, as a subclass of Transformers' class."""

import functools
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.ernie45_vl.image_processing import normalised
from job.families.ernie45_vl.packed.experts import Modalities
from job.families.ernie45_vl.packed.layers import use_packed_layers
from job.families.ernie45_vl.packed.rope import Angles, halves, neighbours
from job.families.ernie45_vl.packed.varlen_attention import Segments, has_kernel, take
from job.families.loss import supervised_loss


class PackedErnie(native.Ernie4_5_VLMoeForConditionalGeneration):
    """Takes batches of `packed.batch.pack`; given any other it is its parent."""

    by_bounds: bool
    """Whether attention may take the kernel for sequences of unequal length."""

    # Generation reads the names of arguments.
    @functools.wraps(native.Ernie4_5_VLMoeForConditionalGeneration.forward)
    def forward(
        self, *args: Any, targets: torch.Tensor | None = None, **batch: Any
    ) -> native.MoeCausalLMOutputWithPast:
        """The loss alone of a packed batch (logits of no token are kept)."""
        if targets is None:
            return super().forward(*args, **batch)
        hidden, logits = self._hidden(batch)
        loss = supervised_loss(hidden, targets, self.lm_head)
        aux = None
        if self.config.text_config.output_router_logits:
            # With a mask it does not wait for the device.
            everything = torch.ones(batch["input_ids"].shape, device=hidden.device)
            aux = native.load_balancing_loss_func(
                logits, self.num_experts, self.num_experts_per_tok, everything
            )
            loss = loss + self.router_aux_loss_coef * aux
        return native.MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux)

    def _hidden(self, batch: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Normed hidden states of the S supervised tokens (S, H), and each sparse layer's router
        logits (T, experts).
        """
        text = self.model.language_model
        hidden = text.embed_tokens(batch["input_ids"])[0]  # (T, H)
        if "pixels" in batch:
            pictures = self._pictures(batch).to(hidden.dtype)
            hidden = hidden.index_copy(0, batch["image_places"], pictures)
        elif isinstance(self.model.vision_tower.blocks[0], FSDPModule):
            # In shares, weights are gathered by all processes or by none.
            hidden = hidden + 0 * self._pictures(self._blank(hidden.device)).sum()
        cos, sin = text.rotary_emb(hidden, batch["position_ids"])  # (1, T, D)
        angles = Angles.of(cos[0], sin[0], neighbours)
        segments = self._segments(batch, "row")
        tokens = {"modalities": _modalities(batch, "token")}
        routed = []
        for number, layer in enumerate(text.layers, start=1):
            if number == len(text.layers) and self._ends_early(layer):
                tokens = {
                    "modalities": _modalities(batch, "supervised"),
                    "only": batch["supervised"],
                }
            hidden, logits = layer(hidden, angles, segments=segments, **tokens)
            if logits is not None:
                routed.append(logits)
        if "only" not in tokens:
            hidden = take(hidden, batch["supervised"])
        return text.norm(hidden), tuple(routed)

    def _ends_early(self, last: Any) -> bool:
        """Whether the last layer's output is made of supervised tokens alone, as no other is used.

        Not where its router's logits of all tokens count, nor where its experts for pictures are
        trained: their gradient is zero, and an optimizer makes of that something else than of none.
        """
        if self.config.text_config.output_router_logits:
            return False
        pictured = getattr(last.mlp, "vision_moe", None)
        return pictured is None or not any(p.requires_grad for p in pictured.parameters())

    def _segments(self, batch: Any, of: str) -> Segments:
        places, real, bounds = (batch[f"{of}_{part}"] for part in ("places", "real", "bounds"))
        return Segments(places, real, bounds, by_bounds=self.by_bounds)

    def _blank(self, device: torch.device) -> Any:
        """What a batch has of its pictures, for one of a single token."""
        vision = self.config.vision_config
        count = vision.spatial_merge_size**2
        places = torch.arange(count, device=device)
        side = vision.spatial_merge_size
        area = vision.in_channels * vision.patch_size**2
        return {
            "pixels": torch.zeros(count, area, dtype=torch.uint8, device=device),
            "pixel_mean": torch.zeros(area, device=device),
            "pixel_std": torch.ones(area, device=device),
            "patch_position_ids": torch.stack([places // side, places % side], dim=1),
            "patch_places": places,
            "patch_real": torch.ones(1, count, dtype=torch.bool, device=device),
            "patch_bounds": torch.tensor([0, count], dtype=torch.int32, device=device),
        }

    def _pictures(self, batch: Any) -> torch.Tensor:
        """The embeddings of all image tokens in order, (image tokens, H)."""
        tower, resampler = self.model.vision_tower, self.model.resampler_model
        pixels = normalised(batch["pixels"], batch["pixel_mean"], batch["pixel_std"])
        hidden = tower.patch_embed(pixels)  # (patches, vision H)
        cos, sin = tower.rotary_pos_emb(hidden, batch["patch_position_ids"])
        angles = Angles.of(cos, sin, halves)
        segments = self._segments(batch, "patch")
        for block in tower.blocks:
            hidden = block(hidden, position_embeddings=angles, segments=segments)
        hidden = tower.ln(hidden).view(-1, resampler.spatial_dim)
        hidden = resampler.spatial_linear(hidden)
        # A picture is a video of one frame, which stands for both of a pair.
        hidden = resampler.temporal_linear(torch.cat([hidden, hidden], dim=-1))
        return resampler.after_norm(resampler.mlp(hidden))


def _modalities(batch: Any, of: str) -> Modalities:
    return Modalities.ordered(*(batch[f"{of}_{part}"] for part in ("text", "vision", "order")))


def use_packed_step(model: Any, *, by_bounds: bool = True) -> None:
    """Lets a native model take packed batches too; its weights and their names stay."""
    model.__class__ = PackedErnie
    model.by_bounds = by_bounds and has_kernel(model.device)
    use_packed_layers(model)

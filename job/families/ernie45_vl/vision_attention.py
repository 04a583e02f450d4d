"""Vision attention over all images of a padded batch at once.

Without the flash-attn package, Transformers calls attention once per image: hundreds of kernel
launches per layer. This implementation, registered with Transformers, takes the packed images and
their boundaries. Images of one size form a batch without a copy; others are padded.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Transformers passes packed images to implementations with "flash" in their name.
NAME = "packed_sdpa_as_flash"


def use_packed_vision_attention(model: "PreTrainedModel") -> None:
    """Makes the model's vision tower compute all images' attention in one call per layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    model.config.vision_config._attn_implementation_internal = NAME


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Full attention within each of N packed sequences, bounded by `cu_seq_lens_q` (N + 1,).

    (1, heads, T, D) to (1, T, heads, D).
    """
    assert attention_mask is None, "the boundaries are the mask"
    total, count = query.shape[2], len(cu_seq_lens_q) - 1
    tensors = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (T, heads, D) each
    if total == count * max_length_q:
        q, k, v = (t.unflatten(0, (count, max_length_q)).transpose(1, 2) for t in tensors)
        out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)[None], None
    lengths = cu_seq_lens_q.diff()  # (N,)
    mask = torch.arange(max_length_q, device=query.device) < lengths[:, None]  # (N, L)
    q, k, v = (_pad(tensor, mask) for tensor in tensors)  # (N, heads, L, D) each
    key_mask = mask[:, None, None]  # (N, 1, 1, L)
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=key_mask, dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2)[mask][None], None


def _pad(packed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(T, heads, D) to (N, heads, L, D), where `mask` (N, L) is False for padding."""
    zeros = packed.new_zeros(*mask.shape, *packed.shape[1:])
    return zeros.masked_scatter(mask[..., None, None], packed).transpose(1, 2)

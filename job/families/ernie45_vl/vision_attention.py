"""Vision attention over all images of a batch at once.

Transformers calls attention once per image wherever no flash-attention package is installed:
hundreds of launches a layer. This implementation is registered beside its own and given the
batch packed with its boundaries; images of one size are a batch as they are, others are padded.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Transformers hands over the packed batch to implementations with "flash" in their name.
NAME = "packed_sdpa_as_flash"


def use_packed_vision_attention(model: "PreTrainedModel") -> None:
    """Lets the model's vision tower attend to all images of a batch in one call a layer."""
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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention within each sequence of a packed batch.

    `query`, `key` and `value` are (1, H, T, D), the N sequences one after the other, their
    boundaries in `cu_seq_lens_q` (N + 1). Gives (1, T, H, D).
    """
    assert attention_mask is None, "the boundaries are the mask"
    total, count = query.shape[2], len(cu_seq_lens_q) - 1
    tensors = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (T, H, D) each
    if total == count * max_length_q:
        q, k, v = (t.unflatten(0, (count, max_length_q)).transpose(1, 2) for t in tensors)
        out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).flatten(0, 1)[None], None
    lengths = cu_seq_lens_q.diff()  # (N,)
    real = torch.arange(max_length_q, device=query.device) < lengths[:, None]  # (N, L)
    q, k, v = (_pad(tensor, real) for tensor in tensors)  # (N, H, L, D) each
    mask = real[:, None, None]  # (N, 1, 1, L)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2)[real][None], None


def _pad(packed: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(T, H, D) to (N, H, L, D), by the places `real` (N, L) that hold a token."""
    room = packed.new_zeros(*real.shape, *packed.shape[1:])
    return room.masked_scatter(real[..., None, None], packed).transpose(1, 2)

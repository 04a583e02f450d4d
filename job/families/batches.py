"""The batches that models take: what every tensor is called and how it is shaped.

B rows, T tokens, N sequences of at most L tokens, S supervised tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    import torch

COUNTED = "counted_tokens"
"""Key of a training batch, beside the model's inputs: the number of supervised tokens."""
TOKENS = "tokens"
"""Likewise: the number of tokens, without padding."""
FAILED = "failed"
"""Key of the error that a data worker returns instead of a batch; training raises it."""


class PaddedBatch(TypedDict):
    """Rows padded to the longest. A vision-language processor may add inputs of its own."""

    input_ids: "torch.Tensor"
    """(B, T)"""
    attention_mask: "torch.Tensor"
    """(B, T): 0 where there is padding."""
    labels: NotRequired["torch.Tensor"]
    """(B, T), in training: `IGNORED` for tokens that are not supervised."""
    position_ids: NotRequired["torch.Tensor"]
    """(3, B, T): M-RoPE positions (time, height, width)."""
    mm_token_type_ids: NotRequired["torch.Tensor"]
    """(B, T): 1 for image tokens."""
    moe_mm_token_type_ids: NotRequired["torch.Tensor"]
    """(B, T): 1 for tokens of the vision experts, which are image tokens and their brackets."""
    pixel_values: NotRequired["torch.Tensor"]
    """(patches, channels · patch_size²) of all images; the shape of other processors differs."""
    image_grid_thw: NotRequired["torch.Tensor"]
    """(images, 3): frames, rows and columns of patches."""
    image_cu_seqlens: NotRequired["torch.Tensor"]
    """(images + 1,): where each image's patches begin, and the end of the last."""
    image_position_ids: NotRequired["torch.Tensor"]
    """(patches, 2): row and column of each patch."""


class PatchInputs(TypedDict, total=False):
    """The vision tower's inputs in a packed batch; all or none of them are there."""

    pixels: "torch.Tensor"
    """(patches, channels · patch_size²), uint8."""
    pixel_mean: "torch.Tensor"
    """(channels · patch_size²,)"""
    pixel_std: "torch.Tensor"
    """(channels · patch_size²,)"""
    patch_position_ids: "torch.Tensor"
    """(patches, 2): row and column of each patch."""
    patch_indices: "torch.Tensor"
    """(patches,): like `row_indices`, for images and their patches."""
    patch_mask: "torch.Tensor"
    """(images, most patches of one), bool."""
    patch_cu_seqlens: "torch.Tensor"
    """(images + 1,), int32."""
    image_token_indices: "torch.Tensor"
    """(image tokens,): where the image embeddings go among the T tokens."""


class PackedBatch(PatchInputs):
    """Rows concatenated without padding, with every index that ERNIE-4.5-VL's step needs."""

    input_ids: "torch.Tensor"
    """(1, T)"""
    position_ids: "torch.Tensor"
    """(3, 1, T): M-RoPE positions (time, height, width)."""
    row_indices: "torch.Tensor"
    """(T,): where each token lies in the padded (N, L) grid, flattened."""
    row_mask: "torch.Tensor"
    """(N, L), bool: False where the grid is padding."""
    row_cu_seqlens: "torch.Tensor"
    """(N + 1,), int32: where each row begins, and the end of the last."""
    supervised: "torch.Tensor"
    """(S,): the tokens whose successor is supervised."""
    targets: "torch.Tensor"
    """(S,): those successors."""
    token_text: "torch.Tensor"
    """(text tokens,): the tokens of the text experts."""
    token_vision: "torch.Tensor"
    """(vision tokens,): the tokens of the vision experts."""
    token_inverse: "torch.Tensor"
    """(T,): where each token lies in the concatenation of the two."""
    supervised_text: "torch.Tensor"
    """The same three among the S supervised tokens."""
    supervised_vision: "torch.Tensor"
    supervised_inverse: "torch.Tensor"


Batch = PaddedBatch | PackedBatch
B = TypeVar("B", bound=Mapping[str, object])


def host_keys(batch: Mapping[str, object]) -> tuple[str, ...]:
    """The inputs that the model reads in Python: on a GPU every value would be a sync.

    Only if the batch has the vision tower's indices; other towers compute them from the grids.
    """
    return ("image_grid_thw",) if "image_position_ids" in batch else ()


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A training batch without the token counts."""
    return {key: value for key, value in batch.items() if key not in (COUNTED, TOKENS)}


def to_device(batch: B, device: "torch.device") -> B:
    """The batch on the device, except for its `host_keys`."""
    host, tensors = host_keys(batch), cast("Mapping[str, torch.Tensor]", batch)
    return cast(B, {k: v if k in host else v.to(device) for k, v in tensors.items()})

"""The batches that models take: names and shapes of all tensors.

B rows, T tokens, N sequences of at most L tokens, S supervised tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    import torch

    from job.errors import JobError


class PaddedBatch(TypedDict):
    """Rows padded to the longest. A vision-language processor may add further inputs."""

    input_ids: "torch.Tensor"
    """(B, T)"""
    attention_mask: "torch.Tensor"
    """(B, T): 0 for padding."""
    labels: NotRequired["torch.Tensor"]
    """(B, T), only in training: `IGNORED` for tokens that are not supervised."""
    position_ids: NotRequired["torch.Tensor"]
    """(3, B, T): M-RoPE positions (time, height, width)."""
    mm_token_type_ids: NotRequired["torch.Tensor"]
    """(B, T): 1 for image tokens."""
    moe_mm_token_type_ids: NotRequired["torch.Tensor"]
    """(B, T): 1 for tokens of the vision experts: image tokens, and image start and end tokens."""
    pixel_values: NotRequired["torch.Tensor"]
    """(patches, channels · patch_size²) of all images; other processors have other shapes."""
    image_grid_thw: NotRequired["torch.Tensor"]
    """(images, 3): frames, rows and columns of patches."""
    image_cu_seqlens: NotRequired["torch.Tensor"]
    """(images + 1,): where each image's patches begin, and the end of the last."""
    image_position_ids: NotRequired["torch.Tensor"]
    """(patches, 2): row and column of each patch."""


class PatchInputs(TypedDict, total=False):
    """The vision tower's inputs in a packed batch; all present, or none if there is no image."""

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
    """(image tokens,): indices of the image tokens among the T tokens."""
    image_token_sources: "torch.Tensor"
    """(image tokens,): which of the merged patches each stands for; absent if it is each its own.
    """


class PackedBatch(PatchInputs):
    """Rows concatenated without padding, with every index that ERNIE-4.5-VL's step needs."""

    input_ids: "torch.Tensor"
    """(1, T)"""
    position_ids: "torch.Tensor"
    """(3, 1, T): M-RoPE positions (time, height, width)."""
    row_indices: "torch.Tensor"
    """(T,): each token's index in the flattened (N, L) grid."""
    row_mask: "torch.Tensor"
    """(N, L), bool: False where the grid is padding."""
    row_cu_seqlens: "torch.Tensor"
    """(N + 1,), int32: where each row begins, and the end of the last."""
    supervised: "torch.Tensor"
    """(S,): indices of the tokens whose successor is supervised."""
    targets: "torch.Tensor"
    """(S,): the labels of those successors."""
    token_text: "torch.Tensor"
    """(text tokens,): indices of the tokens for the text experts."""
    token_vision: "torch.Tensor"
    """(vision tokens,): indices of the tokens for the vision experts."""
    token_inverse: "torch.Tensor"
    """(T,): each token's index in the concatenation of the two."""
    supervised_text: "torch.Tensor"
    """The same three, among the S supervised tokens."""
    supervised_vision: "torch.Tensor"
    supervised_inverse: "torch.Tensor"
    token_mask: NotRequired["torch.Tensor"]
    """(T,), bool: False for padding, only if the batch is padded to a bucket."""


class MicroBatch(TypedDict, total=False):
    """A micro-batch of one process, as the collator returns it.

    The model's inputs, from the family's `collate` or `pack` (only those common to all families are
    listed), and the keys that training adds.
    """

    input_ids: "torch.Tensor"
    """(B, T) if padded to the longest row; (1, T) if packed: all rows' tokens in one sequence."""
    labels: "torch.Tensor"
    """(B, T), only if padded: `IGNORED` for tokens that are not supervised."""
    counted_tokens: int
    """Number of supervised tokens; a dummy row's are not counted."""
    tokens: int
    """Number of tokens without padding, for the throughput."""
    images: int
    """Number of images, without those of dummy rows."""
    bucket: int
    """The number of the bucket that the batch is padded to, if it is."""
    failed: "JobError"
    """The only key if the batch could not be built; the training process raises it."""


Batch = PaddedBatch | PackedBatch
ADDED_KEYS = ("counted_tokens", "tokens", "images", "bucket")
"""The keys of a micro-batch that are no inputs of the model."""
B = TypeVar("B", bound=Mapping[str, object])


def host_keys(batch: Mapping[str, object]) -> tuple[str, ...]:
    """The inputs that the model reads in Python, and that stay on the CPU to avoid device syncs.

    Only if the batch has the vision tower's indices: other towers compute them from the grid, on
    the device.
    """
    return ("image_grid_thw",) if "image_position_ids" in batch else ()


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The model's inputs: a training batch without the keys that training adds."""
    return {key: value for key, value in batch.items() if key not in ADDED_KEYS}


def to_device(batch: B, device: "torch.device") -> B:
    """Moves the batch to the device, except for its `host_keys`."""
    host, tensors = host_keys(batch), cast("Mapping[str, torch.Tensor]", batch)
    return cast(B, {k: v if k in host else v.to(device) for k, v in tensors.items()})

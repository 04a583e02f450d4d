"""Rows that show the same images: the vision tower computes each image once.

The padded batch of ERNIE-4.5-VL lists the patches image by image, with where each begins. Batches
of other models stay as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from job.families.encoded import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def images_once(
    base: "PreTrainedModel", batch: Mapping[str, Any], rows: Sequence[Encoded]
) -> Iterator[dict[str, Any]]:
    """A context in which `base` takes the batch that this gives, to the same effect as `batch`, the
    padded batch of `rows`.

    Images are the same if they are the same object. Features of a repeated one are used repeatedly,
    so the gradient of the tower's weights is the sum over its uses.
    """
    images = [id(image) for row in rows for image in row.images]
    first = {image: images.index(image) for image in images}
    if "image_cu_seqlens" not in batch or len(first) == len(images):
        yield dict(batch)
        return
    numbers = {image: number for number, image in enumerate(first)}
    places = [numbers[image] for image in images]
    model = base.model
    original = model.get_image_features

    def get_image_features(*args: Any, **more: Any) -> Any:  # noqa: ANN401 - Transformers' own
        output = original(*args, **more)
        features = output.pooler_output
        output.pooler_output = tuple(features[place] for place in places)
        return output

    model.get_image_features = get_image_features
    try:
        yield _of_images(batch, list(first.values()))
    finally:
        del model.get_image_features


def _of_images(batch: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """The batch with some of its images only."""
    bounds = batch["image_cu_seqlens"].tolist()
    device = batch["pixel_values"].device
    patches = torch.cat([torch.arange(bounds[i], bounds[i + 1], device=device) for i in chosen])
    counts = torch.tensor([bounds[i + 1] - bounds[i] for i in chosen], device=device)
    return {
        **batch,
        "pixel_values": batch["pixel_values"][patches],
        "image_grid_thw": batch["image_grid_thw"][list(chosen)],
        "image_cu_seqlens": pad(counts.cumsum(0), (1, 0)).int(),
        "image_position_ids": batch["image_position_ids"][patches],
    }

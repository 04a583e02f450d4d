"""Cuts images into the patches that the vision tower reads.

The results equal those of the checkpoint's image processor, which works image by image; a test
compares them. Here, images of one size that need no resizing are processed together, which is about
five times as fast; this is most of the data workers' time.

Patches stay uint8 until they are normalized on the device: a quarter of the data to copy from the
workers to the training process and to the device.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Ernie4_5_VLMoeImageProcessor

Grid = tuple[int, int, int]
"""Frames, and height and width in patches, before merging."""


def patches(
    images: Sequence["Image"], processor: "Ernie4_5_VLMoeImageProcessor"
) -> tuple[torch.Tensor, list[Grid]]:
    """All images' patches, (patches, channels · patch_size²) uint8, and each image's grid."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.size, []).append(index)
    by_image: dict[int, torch.Tensor] = {}
    grids: dict[int, Grid] = {}
    for (width, height), members in by_size.items():
        group = [images[index] for index in members]
        if _needs_no_resizing(height, width, processor):
            stacked = _patches_of_equal(group, processor)  # (N, patches, channels · patch_size²)
            grid = (1, height // processor.patch_size, width // processor.patch_size)
            for index, pixels in zip(members, stacked, strict=True):
                by_image[index], grids[index] = pixels, grid
        else:
            for index in members:
                output = processor(
                    images=[images[index]],
                    do_rescale=False,
                    do_normalize=False,
                    return_tensors="pt",
                )
                by_image[index] = output["pixel_values"]
                time, rows, columns = output["image_grid_thw"][0].tolist()
                grids[index] = (time, rows, columns)
    order = range(len(images))
    return torch.cat([by_image[index] for index in order]), [grids[index] for index in order]


def mean_and_std(
    processor: "Ernie4_5_VLMoeImageProcessor",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each value of a patch, (channels · patch_size²,) each."""
    area = processor.patch_size**2
    mean, std = (
        (torch.tensor(values) * (1.0 / processor.rescale_factor)).repeat_interleave(area)
        for values in (processor.image_mean, processor.image_std)
    )
    return mean, std


def normalized(patches: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The normalized patches, (patches, channels · patch_size²) fp32."""
    return patches.float().sub_(mean).div_(std)


def _needs_no_resizing(height: int, width: int, processor: "Ernie4_5_VLMoeImageProcessor") -> bool:
    factor = processor.patch_size * processor.merge_size
    within = processor.size["shortest_edge"] <= height * width <= processor.size["longest_edge"]
    return height % factor == 0 and width % factor == 0 and within


def _patches_of_equal(
    images: Sequence["Image"], processor: "Ernie4_5_VLMoeImageProcessor"
) -> torch.Tensor:
    """The patches of N images of one size, (N, patches, channels · patch_size²) uint8."""
    size, merge = processor.patch_size, processor.merge_size
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (N, H, W, C)
    count, height, width, channels = pixels.shape
    blocks = pixels.view(
        count, height // size // merge, merge, size, width // size // merge, merge, size, channels
    )
    # To (N, rows, columns, rows in a block, columns in a block, C, y, x).
    ordered = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6)
    return ordered.reshape(count, -1, channels * size * size)

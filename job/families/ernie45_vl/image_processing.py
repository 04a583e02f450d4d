"""Images to the patches that the vision tower takes.

The same numbers as the checkpoint's image processor gives (a test holds them equal), which works
through a batch image by image. Pictures that need no resizing, as those of one page layout, are
worked through together: about five times as fast, and it is the data workers' largest piece.

Patches are bytes, as pictures are, until the tower takes them: a quarter of what would have to be
copied from a worker to the training process, and from there to the device.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Ernie4_5_VLMoeImageProcessor

Grid = tuple[int, int, int]
"""Temporal, height and width in patches, before merging."""


def patches(
    images: Sequence["Image"], processor: "Ernie4_5_VLMoeImageProcessor"
) -> tuple[torch.Tensor, list[Grid]]:
    """(patches, channels · patch_size²) bytes of all images in order, and each image's grid."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.size, []).append(index)
    found: dict[int, torch.Tensor] = {}
    grids: dict[int, Grid] = {}
    for (width, height), members in by_size.items():
        group = [images[index] for index in members]
        if _needs_no_resizing(height, width, processor):
            made = _patches_of_equal(group, processor)  # (N, patches, dimension)
            grid = (1, height // processor.patch_size, width // processor.patch_size)
            for index, each in zip(members, made, strict=True):
                found[index], grids[index] = each, grid
        else:
            for index in members:
                output = processor(
                    images=[images[index]],
                    do_rescale=False,
                    do_normalize=False,
                    return_tensors="pt",
                )
                found[index] = output["pixel_values"]
                time, rows, columns = output["image_grid_thw"][0].tolist()
                grids[index] = (time, rows, columns)
    order = range(len(images))
    return torch.cat([found[index] for index in order]), [grids[index] for index in order]


def scale(processor: "Ernie4_5_VLMoeImageProcessor") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each byte of a patch, (channels · patch_size²) each."""
    area = processor.patch_size**2
    mean, std = (
        (torch.tensor(values) * (1.0 / processor.rescale_factor)).repeat_interleave(area)
        for values in (processor.image_mean, processor.image_std)
    )
    return mean, std


def normalised(patches: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The bytes as the numbers that the vision tower takes, (patches, channels · patch_size²)."""
    return patches.float().sub_(mean).div_(std)


def _needs_no_resizing(height: int, width: int, processor: Any) -> bool:
    factor = processor.patch_size * processor.merge_size
    within = processor.size["shortest_edge"] <= height * width <= processor.size["longest_edge"]
    return height % factor == 0 and width % factor == 0 and within


def _patches_of_equal(images: Sequence["Image"], processor: Any) -> torch.Tensor:
    """(N, patches, channels · patch_size²) bytes of N images of one size."""
    size, merge = processor.patch_size, processor.merge_size
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (N, H, W, C)
    count, height, width, channels = pixels.shape
    blocks = pixels.view(
        count, height // size // merge, merge, size, width // size // merge, merge, size, channels
    )
    # To (N, rows, columns, rows in a block, columns in a block, C, y, x).
    packed = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6)
    return packed.reshape(count, -1, channels * size * size)

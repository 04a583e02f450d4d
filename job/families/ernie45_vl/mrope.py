"""M-RoPE: the 3-D position ids of ERNIE-4.5-VL, computed by the data workers.

Transformers computes them inside `forward`, in Python over device tensors: dozens of device syncs
per row. These are the same values, computed from lists; a test compares them with
`Ernie4_5_VLMoeModel.get_rope_index`.
"""

from collections.abc import Iterator, Sequence

import torch

from job.families.ernie45_vl.image_processing import Grid


def mrope_positions(
    is_image: Sequence[Sequence[bool]],
    grids: Sequence[Grid],
    *,
    spatial_merge_size: int,
    length: int,
) -> torch.Tensor:
    """Time, height and width positions, (3, B, T) with T = `length`.

    `is_image` flags the image tokens of each unpadded row; `grids` are the batch's images in
    order. Text tokens advance all three positions by one. All tokens of an image share one time
    position; their height and width positions are offset from it by their row and column. Text
    after an image continues from the image's longer side. Right padding stays 0.
    """
    positions = torch.zeros(3, len(is_image), length, dtype=torch.long)
    remaining = iter(grids)
    for row, flags in enumerate(is_image):
        start = 0  # index of the run's first token
        position = 0  # its position
        for image, count in _runs(flags):
            end = start + count
            if image:
                for grid in _grids_of_run(remaining, count, spatial_merge_size):
                    _, height, width = grid
                    rows, columns = height // spatial_merge_size, width // spatial_merge_size
                    tokens = rows * columns
                    index = torch.arange(tokens)
                    target = positions[:, row, start : start + tokens]  # (3, tokens)
                    target[0] = position
                    target[1] = position + index // columns
                    target[2] = position + index % columns
                    position += max(rows, columns)
                    start += tokens
            else:
                positions[:, row, start:end] = torch.arange(position, position + count)
                position += count
            start = end
    return positions


def _runs(flags: Sequence[bool]) -> Iterator[tuple[bool, int]]:
    """Each run of equal flags, with its length."""
    start = 0
    for index in range(1, len(flags) + 1):
        if index == len(flags) or flags[index] != flags[start]:
            yield flags[start], index - start
            start = index


def _grids_of_run(remaining: Iterator[Grid], count: int, merge: int) -> Iterator[Grid]:
    """The images in a run of `count` image tokens; chat templates give only one."""
    while count > 0:
        grid = next(remaining)
        count -= grid[1] * grid[2] // merge**2
        yield grid
    assert count == 0, "image tokens and image grids do not match"

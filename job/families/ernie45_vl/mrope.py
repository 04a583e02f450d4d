"""The 3-D rotary positions of ERNIE-4.5-VL, made on the host before a step.

Transformers computes them inside `forward`, in Python over device tensors: dozens of host
synchronisations a row. These are the same numbers from lists (checked against
`Ernie4_5_VLMoeModel.get_rope_index` by a test), so the model is handed tensors.
"""

from collections.abc import Iterator, Sequence

import torch

from job.families.ernie45_vl.image_processing import Grid


def rope_positions(
    is_image: Sequence[Sequence[bool]],
    grids: Sequence[Grid],
    *,
    spatial_merge_size: int,
    length: int,
) -> torch.Tensor:
    """Temporal, height and width positions, shape (3, B, T) with T = `length`.

    `is_image` marks the image tokens of each unpadded row; `grids` holds every image of the
    batch in order. Text counts on by one in all three; an image's tokens take the place of its
    first in time and their row and column in space, and the text after it goes on from its
    longer side. Padding (on the right) stays 0.
    """
    positions = torch.zeros(3, len(is_image), length, dtype=torch.long)
    remaining = iter(grids)
    for row, marks in enumerate(is_image):
        start = 0  # the token's place in the row
        position = 0  # the position it is given
        for image, count in _runs(marks):
            end = start + count
            if image:
                for grid in _grids_of_run(remaining, count, spatial_merge_size):
                    _, height, width = grid
                    rows, columns = height // spatial_merge_size, width // spatial_merge_size
                    tokens = rows * columns
                    place = torch.arange(tokens)
                    target = positions[:, row, start : start + tokens]  # (3, tokens)
                    target[0] = position
                    target[1] = position + place // columns
                    target[2] = position + place % columns
                    position += max(rows, columns)
                    start += tokens
            else:
                positions[:, row, start:end] = torch.arange(position, position + count)
                position += count
            start = end
    return positions


def _runs(marks: Sequence[bool]) -> Iterator[tuple[bool, int]]:
    start = 0
    for index in range(1, len(marks) + 1):
        if index == len(marks) or marks[index] != marks[start]:
            yield marks[start], index - start
            start = index


def _grids_of_run(remaining: Iterator[Grid], count: int, merge: int) -> Iterator[Grid]:
    """The grids whose tokens fill a run of `count` image tokens: one, by the chat template."""
    while count > 0:
        grid = next(remaining)
        count -= grid[1] * grid[2] // merge**2
        yield grid
    assert count == 0, "image tokens and image grids do not match"

"""Encoded rows to a batch without padding, with every index that the step needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from job.families.base import IGNORED, Batch, Encoded
from job.families.ernie45_vl.collate import patch_places
from job.families.ernie45_vl.image_processing import Grid, patches, scale
from job.families.ernie45_vl.mrope import rope_positions
from job.families.ernie45_vl.packed.experts import Modalities
from job.families.ernie45_vl.packed.varlen_attention import Segments
from job.prep.images import decode

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor


def pack(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> Batch:
    """A training batch of the rows one after another, T tokens in all.

    `input_ids` (1, T), `position_ids` (3, 1, T), the places of each row's tokens, `supervised`
    (S,) with the `targets` (S,) that the hidden states there foretell, the tokens of either
    modality, among all and among the supervised, and where there are images their `pixels`
    (patches, 588) as bytes, `pixel_mean` and `pixel_std` (588,), every patch's row and column, and
    the places of patches and image tokens.
    """
    ids = torch.tensor([token for row in rows for token in row.input_ids])  # (T,)
    # Each row's first label is foretold by nothing.
    labels = torch.tensor(
        [label for row in rows for label in (*row.labels[1:], IGNORED)]
    )  # (T,), of the token after
    lengths = [len(row.input_ids) for row in rows]
    supervised = (labels != IGNORED).nonzero()[:, 0]
    image = ids == processor.image_token_id
    brackets = (ids == processor.image_start_token_id) | (ids == processor.image_end_token_id)
    pictured = image | brackets
    segments = Segments.of(lengths)
    batch: Batch = {
        "input_ids": ids[None],
        "supervised": supervised,
        "targets": labels[supervised],
        "row_places": segments.places,
        "row_real": segments.real,
        "row_bounds": segments.bounds,
    }
    for name, marks in (("token", pictured), ("supervised", pictured[supervised])):
        modalities = Modalities.of(marks)
        batch[f"{name}_text"], batch[f"{name}_vision"] = modalities.text, modalities.vision
        batch[f"{name}_order"] = modalities.order
    merge = processor.image_processor.merge_size
    pictures = [decode(picture) for row in rows for picture in row.images]
    grids: list[Grid] = []
    if pictures:
        batch["pixels"], grids = patches(pictures, processor.image_processor)
        batch["pixel_mean"], batch["pixel_std"] = scale(processor.image_processor)
        places = Segments.of([height * width for _, height, width in grids])
        batch["patch_places"], batch["patch_real"] = places.places, places.real
        batch["patch_bounds"] = places.bounds
        batch["patch_position_ids"] = patch_places(grids, merge)
        batch["image_places"] = image.nonzero()[:, 0]
    positions = rope_positions(
        [[token == processor.image_token_id for token in row.input_ids] for row in rows],
        grids,
        spatial_merge_size=merge,
        length=max(lengths),
    )  # (3, rows, L)
    batch["position_ids"] = positions.flatten(1)[:, None, segments.places]
    return batch

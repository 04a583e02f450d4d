"""Reads and writes a checkpoint's files other than weights, in either layout."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError
from job.families import tokenizer_files, transformers_format
from job.families.base import Checkpoint, Layout
from job.families.ernie45_vl.published_format.config import MODEL_TYPE as PUBLISHED
from job.families.ernie45_vl.published_format.config import to_flat, to_nested
from job.spec.types import DataSpec

if TYPE_CHECKING:
    import torch
    from transformers import Ernie4_5_VLMoeProcessor


def read(checkpoint: Checkpoint) -> "tuple[Checkpoint, Ernie4_5_VLMoeProcessor]":
    """The checkpoint with its configuration in Transformers' layout, and its processor.

    Raises InputError if either cannot be read.
    """
    from transformers import Ernie4_5_VLMoeProcessor

    if checkpoint.config.get("model_type") == PUBLISHED:
        return _read_published(checkpoint)
    try:
        processor = Ernie4_5_VLMoeProcessor.from_pretrained(checkpoint.directory)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            checkpoint.uri,
            f"its processor cannot be read: {error}",
            fix="it needs processor_config.json, tokenizer.json and chat_template.jinja",
        ) from error
    return checkpoint, processor


def nested_config(uri: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration in Transformers' layout. Raises InputError if it cannot be read."""
    if config.get("model_type") != PUBLISHED:
        return copy.deepcopy(config)
    try:
        return to_nested(config)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            uri,
            f"its config.json cannot be read as ERNIE-4.5-VL: {type(error).__name__}: {error}",
        ) from error


def set_pixel_limits(processor: "Ernie4_5_VLMoeProcessor", data: DataSpec) -> None:
    """Sets the spec's limits on the size of images."""
    size = dict(processor.image_processor.size)
    if data.min_pixels is not None:
        size["shortest_edge"] = data.min_pixels
    if data.max_pixels is not None:
        size["longest_edge"] = data.max_pixels
    processor.image_processor.size = type(processor.image_processor.size)(**size)


def write(
    checkpoint: Checkpoint,
    processor: "Ernie4_5_VLMoeProcessor",
    directory: Path,
    dtype: "torch.dtype",
    layout: Layout,
) -> None:
    """Writes `config.json`, and the processor with its tokenizer."""
    from job.families.ernie45_vl.published_format import processor as published_processor

    if layout == "transformers":
        transformers_format.write_config(checkpoint.config, directory, dtype)
        tokenizer_files.save(processor, directory)
        return
    config = {
        **to_flat(checkpoint.config),
        "auto_map": published_processor.AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
    }
    published_processor.write(processor, directory)
    transformers_format.write_json(config, directory / "config.json")


def _read_published(checkpoint: Checkpoint) -> "tuple[Checkpoint, Ernie4_5_VLMoeProcessor]":
    from job.families.ernie45_vl.published_format import processor as published_processor

    config = nested_config(checkpoint.uri, checkpoint.config)
    processor = published_processor.read(
        checkpoint.uri, checkpoint.directory, checkpoint.chat_template
    )
    # The published format has no field for the video placeholder; servers use the image's.
    config.setdefault("video_token_id", processor.video_token_id)
    return replace(checkpoint, config=config), processor

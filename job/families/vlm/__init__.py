"""Vision-language models, by Transformers' `AutoModelForImageTextToText`.

The checkpoint's own processor determines the text and the tensors for an image.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from job.errors import InputError, SpecError
from job.families import chat
from job.families.auto import AutoFamily
from job.families.base import Checkpoint
from job.families.batches import PaddedBatch
from job.families.encoded import Encoded
from job.prep.images import decode
from job.prep.rows import EncodedImage
from job.spec.types import DataSpec

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MAX_CACHED_SIZES = 1024
"""Image sizes whose expansions are cached; an expansion may be a hundred kilobytes."""
PIXEL_LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Keys of `data` in the spec, and what Transformers' image processors call them."""


class Vlm(AutoFamily):
    """A vision-language model bound to its processor."""

    name = "vlm"
    auto = "AutoModelForImageTextToText"
    reads_images = True
    processor: "ProcessorMixin"

    def __init__(self, checkpoint: Checkpoint, processor: "ProcessorMixin") -> None:
        super().__init__(checkpoint, processor)
        self._expansions: dict[tuple[int, int], str] = {}
        self._image_tokens = {id_ for id_ in processor.image_token_ids if id_ is not None}
        self._add_brackets()

    @staticmethod
    def recognizes(config: dict[str, Any]) -> bool:
        return isinstance(config.get("vision_config"), dict)

    @classmethod
    def bind(cls, checkpoint: Checkpoint, data: DataSpec) -> "Vlm":
        from transformers import AutoProcessor

        cls._config(checkpoint.uri, checkpoint.config)
        try:
            processor = AutoProcessor.from_pretrained(checkpoint.directory, trust_remote_code=False)
        except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
            raise InputError(
                checkpoint.uri,
                f"its processor cannot be read: {error}",
                fix="it needs processor_config.json or preprocessor_config.json, and a tokenizer",
            ) from error
        if getattr(processor, "image_token", None) is None:
            raise InputError(
                checkpoint.uri,
                f"its {type(processor).__name__} has no image_token",
                fix="use a model whose processor has an image_token",
            )
        _set_pixel_limits(processor, data)
        return cls(checkpoint, processor)

    @property
    def _image_placeholder(self) -> str:
        return str(self.processor.image_token)

    def is_image_token(self, token: int) -> bool:
        """Whether images are expanded to this token, or the chat template brackets them by it."""
        return token in self._image_tokens

    def _expand_images(self, text: str, images: list[EncodedImage]) -> str:
        first, *rest = text.split(self.processor.image_token)
        pieces = [first]
        for piece in rest:
            image = self._next_image(images)
            pieces += [self._expansion(image.width, image.height), piece]
        return "".join(pieces)

    def _expansion(self, width: int, height: int) -> str:
        """The text to which the processor expands an image of this size."""
        cached = self._expansions.get((width, height))
        if cached is not None:
            return cached
        if len(self._expansions) >= MAX_CACHED_SIZES:
            self._expansions.clear()
        text = self._expansions[width, height] = self._expand_blank_image(width, height)
        special = self.processor.tokenizer.added_tokens_decoder
        self._image_tokens |= {token for token in self._tokens(text) if token in special}
        return text

    def _expand_blank_image(self, width: int, height: int) -> str:
        """Expands a blank image, because only the size matters."""
        from PIL import Image

        try:
            offsets = self.processor(
                text=[self.processor.image_token],
                images=[[Image.new("RGB", (width, height))]],
                add_special_tokens=False,
                return_text_replacement_offsets=True,
            )["text_replacement_offsets"]
            return str(offsets[0][0]["replacement"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                self._checkpoint.uri,
                f"its {type(self.processor).__name__} does not report the text for an image of "
                f"{width} × {height}: {type(error).__name__}: {error}",
                fix="use a model whose processor follows the current interface of Transformers",
            ) from error

    def _add_brackets(self) -> None:
        """Adds the control tokens that the template puts around an image to the image tokens."""
        text = "".join(
            segment.text for segment in self._segments("the chat template", chat.IMAGE_PROBE)
        )
        control, token = self._control.pattern.pattern, re.escape(self.processor.image_token)
        match = re.search(rf"({control})?{token}({control})?", text)
        brackets = [each for each in (match.groups() if match else ()) if each]
        self._image_tokens |= {*self.processor.tokenizer.convert_tokens_to_ids(brackets)}

    def _with_images(self, batch: PaddedBatch, rows: Sequence[Encoded]) -> PaddedBatch:
        """Adds the processor's image tensors, and the token types if the model has them."""
        import torch

        processor = self.processor
        inputs: dict[str, Any] = {**batch}
        # One list for the whole batch: models take images in the order of their tokens.
        if images := [decode(image) for row in rows for image in row.images]:
            inputs |= processor(images=[images], return_tensors="pt")
        if "mm_token_type_ids" in processor.model_input_names:
            types = processor.create_mm_token_type_ids(batch["input_ids"].tolist())
            inputs["mm_token_type_ids"] = torch.tensor(types)  # (B, T)
        return cast(PaddedBatch, inputs)


def _set_pixel_limits(processor: "ProcessorMixin", data: DataSpec) -> None:
    """Sets the spec's limits on the size of images.

    Raises SpecError if the processor has none: a server would not scale images down as training
    does.
    """
    wanted = {key: getattr(data, key) for key in PIXEL_LIMITS if getattr(data, key) is not None}
    if not wanted:
        return
    images = processor.image_processor
    if "min_pixels" not in images.valid_kwargs.__annotations__:
        raise SpecError(
            f"$.data.{next(iter(wanted))}",
            f"cannot be set for {type(images).__name__}, which limits edges, not pixels",
            fix="remove the line; the processor's own settings apply",
        )
    size = dict(images.size) | {PIXEL_LIMITS[key]: value for key, value in wanted.items()}
    images.size = type(images.size)(**size)

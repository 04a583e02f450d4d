"""Models of images and text that `AutoModelForImageTextToText` of Transformers makes.

The checkpoint's own processor says what an image becomes in the text and in tensors.
"""

import re
from collections.abc import Sequence
from typing import Any

from job.errors import DataError, InputError, SpecError
from job.families.auto import PlainFamily
from job.families.base import Batch, Checkpoint, Encoded
from job.prep.images import decode
from job.prep.rows import EncodedImage, Message, Part
from job.spec.types import DataSpec

MOST_SIZES = 1024
"""Sizes of images whose texts are kept; each may be a hundred kilobytes."""
BOUNDS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
_AROUND = (
    Message(role="user", parts=(Part(text="a"), Part(image=0), Part(text="b"))),
    Message(role="assistant", parts=(Part(text="c"),)),
)


class Vlm(PlainFamily):
    """An image-text model bound to its processor."""

    name = "vlm"
    auto = "AutoModelForImageTextToText"
    reads_images = True

    def __init__(self, checkpoint: Checkpoint, processor: Any) -> None:
        super().__init__(checkpoint, processor)
        self._replacements: dict[tuple[int, int], str] = {}
        self._protected = {id_ for id_ in processor.image_token_ids if id_ is not None}
        self._protect_brackets()

    @staticmethod
    def recognises(config: dict[str, Any]) -> bool:
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
                f"its {type(processor).__name__} names no token that stands for an image",
                fix="take a model whose processor has an image_token",
            )
        return cls(checkpoint, _with_bounds(processor, data))

    def protects(self, token: int) -> bool:
        """What a processor puts in an image's place, and its brackets in the template."""
        return token in self._protected

    def _expanded(self, text: str, pending: list[EncodedImage]) -> str:
        first, *rest = text.split(self.processor.image_token)
        pieces = [first]
        for piece in rest:
            if not pending:
                raise InputError(
                    self._checkpoint.uri,
                    "its chat template shows more images than the conversation has",
                    fix="use a checkpoint whose template shows each image once",
                )
            image = pending.pop(0)
            pieces += [self._replacement(image.width, image.height), piece]
        return "".join(pieces)

    def _shown(self, row_id: str, pending: Sequence[EncodedImage]) -> None:
        if pending:
            raise DataError(
                row_id,
                f"the checkpoint's chat template does not show {len(pending)} of its images",
                fix="give images in turns of the user, where models read them",
            )

    def _replacement(self, width: int, height: int) -> str:
        """What the processor writes for an image of that size: a blank one tells as well."""
        found = self._replacements.get((width, height))
        if found is None:
            if len(self._replacements) >= MOST_SIZES:
                self._replacements.clear()
            found = self._replacements[width, height] = self._ask_processor(width, height)
            ids = set(self._tokens(found))
            tokenizer = self.processor.tokenizer
            self._protected |= {i for i in ids if i in tokenizer.added_tokens_decoder}
        return found

    def _ask_processor(self, width: int, height: int) -> str:
        from PIL import Image

        try:
            told = self.processor(
                text=[self.processor.image_token],
                images=[[Image.new("RGB", (width, height))]],
                add_special_tokens=False,
                return_text_replacement_offsets=True,
            )["text_replacement_offsets"]
            return str(told[0][0]["replacement"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                self._checkpoint.uri,
                f"its {type(self.processor).__name__} does not tell what it writes for an image of "
                f"{width} × {height}: {type(error).__name__}: {error}",
                fix="take a model whose processor is of the present form of Transformers",
            ) from error

    def _protect_brackets(self) -> None:
        """Control tokens that the template puts right around an image."""
        text = "".join(segment.text for segment in self._segments("the chat template", _AROUND))
        any_of = self._control.anywhere.pattern
        token = re.escape(self.processor.image_token)
        found = re.search(rf"({any_of})?{token}({any_of})?", text)
        around = [each for each in (found.groups() if found else ()) if each]
        self._protected |= {*self.processor.tokenizer.convert_tokens_to_ids(around)}

    def _with_images(self, batch: Batch, rows: Sequence[Encoded]) -> Batch:
        """Adds what the processor makes of the images, and which tokens stand for them."""
        import torch

        processor = self.processor
        # One list for the whole batch: models take images in the order of their tokens.
        if images := [decode(image) for row in rows for image in row.images]:
            batch = {**batch, **processor(images=[images], return_tensors="pt")}
        if "mm_token_type_ids" in processor.model_input_names:
            types = processor.create_mm_token_type_ids(batch["input_ids"].tolist())
            batch = {**batch, "mm_token_type_ids": torch.tensor(types)}  # (B, T)
        return batch


def _with_bounds(processor: Any, data: DataSpec) -> Any:
    """The processor with the spec's limits on the size of pictures.

    Raises SpecError where it has none: what training scaled down a server would not.
    """
    wanted = {key: getattr(data, key) for key in BOUNDS if getattr(data, key) is not None}
    if not wanted:
        return processor
    images = processor.image_processor
    if "min_pixels" not in images.valid_kwargs.__annotations__:
        raise SpecError(
            f"$.data.{next(iter(wanted))}",
            f"cannot be set for {type(images).__name__}, which bounds edges and not pixels",
            fix="remove the line; the processor's own settings hold",
        )
    size = dict(images.size) | {BOUNDS[key]: value for key, value in wanted.items()}
    images.size = type(images.size)(**size)
    return processor

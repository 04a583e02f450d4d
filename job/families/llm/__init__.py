"""Text-only models, by Transformers' `AutoModelForCausalLM`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.errors import DataError, InputError, SpecError
from job.families import chat
from job.families.auto import AutoFamily
from job.families.base import Checkpoint
from job.prep.rows import EncodedImage, Message
from job.spec.types import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TextProcessor:
    """The `Processor` of a model that has only a tokenizer."""

    tokenizer: "PreTrainedTokenizerBase"


class Llm(AutoFamily):
    """A text-only model bound to its tokenizer."""

    name = "llm"
    auto = "AutoModelForCausalLM"
    reads_images = False
    processor: TextProcessor

    @staticmethod
    def recognizes(config: dict[str, Any]) -> bool:
        multimodal = "vision_config" in config or "audio_config" in config
        return "model_type" in config and not multimodal and not config.get("is_encoder_decoder")

    @classmethod
    def bind(cls, checkpoint: Checkpoint, data: DataSpec) -> "Llm":
        from transformers import AutoTokenizer

        cls._config(checkpoint.uri, checkpoint.config)
        for key in ("min_pixels", "max_pixels"):
            if getattr(data, key) is not None:
                raise SpecError(
                    f"$.data.{key}",
                    "limits the size of images, but the model is text-only",
                    fix="remove the line",
                )
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory, trust_remote_code=False)
        except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
            raise InputError(
                checkpoint.uri,
                f"its tokenizer cannot be read: {error}",
                fix="it needs tokenizer.json and tokenizer_config.json",
            ) from error
        return cls(checkpoint, TextProcessor(tokenizer=tokenizer))

    @property
    def _processing_class(self) -> "PreTrainedTokenizerBase":
        return self.processor.tokenizer

    @property
    def _image_placeholder(self) -> None:
        return None

    def _turns(self, messages: Sequence[Message]) -> chat.Turns:
        return chat.turns(messages, as_text=True)

    def _checked_images(
        self, row_id: str, messages: Sequence[Message], images: Sequence[EncodedImage]
    ) -> tuple[EncodedImage, ...]:
        if images:
            raise DataError(
                row_id,
                "has an image, but the model is text-only",
                fix="use rows without images, or a vision-language model",
            )
        return super()._checked_images(row_id, messages, images)

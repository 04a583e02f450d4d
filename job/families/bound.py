"""Code that all families share: tokenization with the chat template, and saving.

Families define how models are built, how images are encoded, and which files a checkpoint has.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import DataError, InputError
from job.families import chat, weight_writing
from job.families.base import Checkpoint, Layout, Processor
from job.families.encoded import IGNORED, Encoded, RowSize
from job.families.weight_files import NamedTensor, Weights
from job.prep.rows import EncodedImage, Message, Part, Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from job.families.stored_weights import StoredWeights


class BoundFamily(ABC):
    """A family bound to one checkpoint's processor."""

    processor: Processor

    def __init__(self, checkpoint: Checkpoint, processor: Processor) -> None:
        self._checkpoint = checkpoint
        self.processor = processor
        if checkpoint.chat_template is not None:
            self._set_chat_template(checkpoint.chat_template)
        self._control = chat.ControlTokens.of(processor.tokenizer)

    # --- ModelBuilding ---------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def architecture(uri: str, config: dict[str, Any]) -> "PreTrainedModel": ...

    @abstractmethod
    def configuration(self) -> "PreTrainedConfig": ...

    @staticmethod
    @abstractmethod
    def keeps_fp32(name: str) -> bool: ...

    @staticmethod
    @abstractmethod
    def _from_config() -> Callable[..., "PreTrainedModel"]:
        """The constructor of models from a configuration."""

    def meta_model(self) -> "PreTrainedModel":
        return self.architecture(self._checkpoint.uri, self._checkpoint.config)

    def without_weights(
        self,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
    ) -> "PreTrainedModel":
        from job.families import placeholders
        from job.families.weight_files import shapes

        uri, directory = self._checkpoint.uri, self._checkpoint.directory
        shapes(uri, directory)  # raises if a file is missing or truncated
        config = self.configuration()
        config.name_or_path = str(directory)  # as `load`; checkpoints name it
        try:
            model = placeholders.model(
                self._from_config(),
                config,
                dtype=dtype,
                device=device,
                attn_implementation=attn_implementation,
            )
        except ValueError as error:  # for example, an unsupported attention implementation
            raise InputError(uri, f"Transformers cannot load it: {error}") from error
        with self.stored_weights() as stored:
            self._require_stored(model, stored)
            placeholders.read_buffers(model, stored)
            placeholders.untie_if_stored_apart(model, stored)
            model._weight_conversions = stored.conversions
        return model

    def _require_stored(self, model: "PreTrainedModel", stored: "StoredWeights") -> None:
        """Raises InputError if the checkpoint lacks a weight, or has one of another shape."""
        from job.families import placeholders, transformers_format

        missing, misshapen = list[str](), list[str]()
        for weight, names in placeholders.names_by_weight(model).items():
            found = [name for name in names if name in stored]
            missing += [] if found else names[:1]
            misshapen += [n for n in found if stored.shape(n) not in (None, tuple(weight.shape))]
        ignored = transformers_format.ignored_when_loaded(model)
        transformers_format.report_differences(
            self._checkpoint.uri,
            missing=missing,
            misshapen=misshapen,
            unexpected=[name for name in stored.unknown if not ignored(name)],
        )

    def stored_weights(self) -> "StoredWeights":
        from job.families.stored_weights import StoredWeights

        return StoredWeights(self._checkpoint.uri, self._checkpoint.directory, self.meta_model())

    def initialize(
        self,
        *,
        seed: int,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
    ) -> "PreTrainedModel":
        from job.families.random_init import initialized

        return initialized(
            self._from_config(),
            self.configuration(),
            seed=seed,
            dtype=dtype,
            device=device,
            keeps_fp32=self.keeps_fp32,
            attn_implementation=attn_implementation,
        )

    # --- RowEncoding -----------------------------------------------------------------------

    @abstractmethod
    def is_image_token(self, token: int) -> bool: ...

    @abstractmethod
    def _turns(self, messages: Sequence[Message]) -> chat.Turns:
        """The messages as the chat template takes them."""

    @abstractmethod
    def _render_template(
        self, turns: chat.Turns, *, add_generation_prompt: bool, enable_thinking: bool = False
    ) -> str:
        """Renders the turns with the chat template."""

    @abstractmethod
    def _tokenize(self, texts: Iterable[str], images: list[EncodedImage]) -> Iterator[list[int]]:
        """Tokenizes consecutive texts, expanding each image placeholder to the image's tokens.

        Removes the images that the texts show from the front of `images`.
        """

    @abstractmethod
    def _set_chat_template(self, template: str) -> None:
        """Replaces the checkpoint's own chat template."""

    @property
    @abstractmethod
    def _image_placeholder(self) -> str | None:
        """What the chat template writes for an image; None if the model is text-only."""

    def require_chat_template(self) -> None:
        name = "the chat template"
        self._segments(name, chat.PROBE)
        placeholder = self._image_placeholder
        if placeholder is not None:
            chat.require_placeholders(
                name, self._segments(name, chat.IMAGE_PROBE), placeholder, images=2
            )

    def require_system_role(self, system: str) -> None:
        message = Message(role="system", parts=(Part(text=system),))
        self._segments("the chat template", (message, *chat.PROBE))

    def encode(self, row: Row) -> Encoded:
        images = self._checked_images(row.id, row.messages, row.images)
        segments, pending = self._segments(row.id, row.messages), list(images)
        ids, labels = list[int](), list[int]()
        texts = [segment.text for segment in segments]
        for segment, tokens in zip(segments, self._tokenize(texts, pending), strict=True):
            ids += tokens
            labels += tokens if segment.supervised else [IGNORED] * len(tokens)
        self._require_shown(row.id, pending)
        return Encoded(id=row.id, input_ids=tuple(ids), labels=tuple(labels), images=images)

    def encode_prompt(
        self,
        row_id: str,
        messages: Sequence[Message],
        images: Sequence[EncodedImage],
        *,
        enable_thinking: bool = False,
    ) -> Encoded:
        ordered = self._checked_images(row_id, messages, images)
        pending = list(ordered)
        template = functools.partial(self._render_template, enable_thinking=enable_thinking)
        [ids] = self._tokenize([chat.prompt(row_id, template, self._turns(messages))], pending)
        self._require_shown(row_id, pending)
        return Encoded(
            id=row_id, input_ids=tuple(ids), labels=(IGNORED,) * len(ids), images=ordered
        )

    def row_size(self, encoded: Encoded) -> RowSize:
        return RowSize(
            tokens=len(encoded.input_ids),
            image_tokens=sum(map(self.is_image_token, encoded.input_ids)),
            supervised_tokens=encoded.supervised_tokens,
            patches=self._patches(encoded.images),
        )

    def _checked_images(
        self, row_id: str, messages: Sequence[Message], images: Sequence[EncodedImage]
    ) -> tuple[EncodedImage, ...]:
        """The images, in the order in which the conversation mentions them.

        Raises DataError if the row contains control tokens, or images that the model cannot read.
        """
        self._control.reject(row_id, messages)
        return chat.in_order(messages, images)

    def _require_shown(self, row_id: str, images: Sequence[EncodedImage]) -> None:
        """Raises DataError if images are left that the chat template did not show."""
        if images:
            raise DataError(
                row_id,
                f"the chat template does not show {len(images)} of its images",
                fix="put images into user turns, where models read them",
            )

    def _next_image(self, images: list[EncodedImage]) -> EncodedImage:
        """Removes the first of the images, for the next placeholder."""
        if not images:
            raise InputError(
                self._checkpoint.uri,
                "the chat template shows more images than the conversation has",
                fix="use a template that shows each image once: the checkpoint's, or "
                "model.chat_template",
            )
        return images.pop(0)

    def _patches(self, images: Sequence[EncodedImage]) -> tuple[int, ...]:
        """The number of patches of each image, before merging; empty if the family cannot tell."""
        return ()

    def _segments(self, row_id: str, messages: Sequence[Message]) -> tuple[chat.Segment, ...]:
        return chat.segments(
            row_id,
            self._render_template,
            self._turns(messages),
            self._control,
            messages,
            thinking=functools.partial(self._render_template, enable_thinking=True),
        )

    def _tokens(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _template_end_token(self) -> int:
        """The token with which the chat template ends an answer."""
        return self._tokens(self._segments("the chat template", chat.PROBE)[-1].text)[-1]

    # --- CheckpointWriting -----------------------------------------------------------------

    @abstractmethod
    def save_settings(
        self, directory: Path, *, dtype: "torch.dtype", layout: Layout
    ) -> tuple[str, ...]: ...

    @abstractmethod
    def _to_checkpoint_format(
        self, model: "PreTrainedModel"
    ) -> Callable[[Iterable[NamedTensor]], Iterable[NamedTensor]]:
        """The conversion of the model's tensors to their names and shapes in files."""

    def save(
        self,
        model: "PreTrainedModel",
        weights: Weights,
        directory: Path,
        *,
        dtype: "torch.dtype",
        max_shard_size: str,
        layout: Layout,
        finished: Callable[[Path], None] | None = None,
    ) -> tuple[str, ...]:
        weight_writing.write(
            weights.converted(self._to_checkpoint_format(model)),
            directory,
            max_shard_size=max_shard_size,
            finished=finished,
        )
        return self.save_settings(directory, dtype=dtype, layout=layout)

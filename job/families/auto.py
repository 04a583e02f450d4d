"""What families share whose checkpoints Transformers reads and writes by its own `Auto` classes.

Their published layout is that of Transformers, and vLLM reads it: both layouts of an export are
the same files.
"""

import functools
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError
from job.families import chat, generation_config, tokenizer_files, transformers_format, weight_files
from job.families.base import (
    IGNORED,
    SORTED_EXPERTS,
    AdapterServing,
    Batch,
    Checkpoint,
    Encoded,
    Layout,
    LoraTargets,
    RowSize,
    Step,
)
from job.families.weight_files import Weights
from job.prep.rows import EncodedImage, Message, Row
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class PlainFamily:
    """A model of Transformers bound to one checkpoint's processor."""

    name: str
    auto: str
    """The `Auto` class of Transformers that makes its models."""
    reads_images: bool
    packs = False
    experts_on_gpu = "grouped_mm"
    served_with: tuple[str, ...] = ()
    adapter_served_with: tuple[str, ...] = ()

    def __init__(self, checkpoint: Checkpoint, processor: Any) -> None:
        self._checkpoint = checkpoint
        self.processor = processor
        if self._writer.chat_template is None:
            raise InputError(
                checkpoint.uri,
                "has no chat template, which says how its conversations are written",
                fix="add the model's chat_template.jinja to its folder",
            )
        self._control = chat.Control.of(processor.tokenizer)

    @staticmethod
    def known(uri: str) -> dict[str, Any] | None:
        return None

    @staticmethod
    def control_tokens(directory: Path) -> frozenset[str]:
        return tokenizer_files.tokens(directory)

    # --- the model -------------------------------------------------------------------------

    @classmethod
    def architecture(cls, uri: str, config: dict[str, Any]) -> "PreTrainedModel":
        import torch

        with torch.device("meta"):
            return cls._auto().from_config(cls._config(uri, config), trust_remote_code=False)

    def skeleton(self) -> "PreTrainedModel":
        return self.architecture(self._checkpoint.uri, self._checkpoint.config)

    def configuration(self) -> Any:
        return self._config(self._checkpoint.uri, self._checkpoint.config)

    def load(
        self, *, dtype: "torch.dtype", device: "torch.device", **kwargs: Any
    ) -> "PreTrainedModel":
        return transformers_format.load(
            self._auto(),
            self._checkpoint.uri,
            self._checkpoint.directory,
            dtype=dtype,
            device=device,
            **kwargs,
        )

    def initialise(
        self, *, seed: int, dtype: "torch.dtype", device: "torch.device", **kwargs: Any
    ) -> "PreTrainedModel":
        from job.families.random_init import initialised

        return initialised(
            self._auto().from_config,
            self.configuration(),
            seed=seed,
            dtype=dtype,
            device=device,
            keeps_fp32=self.keeps_fp32,
            **kwargs,
        )

    @classmethod
    def _auto(cls) -> Any:
        import transformers

        return getattr(transformers, cls.auto)

    @classmethod
    def _config(cls, uri: str, config: dict[str, Any]) -> Any:
        return transformers_format.configuration(cls._auto(), uri, config)

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        return False  # those that the classes of Transformers keep so are stored in the dtype

    @staticmethod
    def lora_targets(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
        from job.families.lora.targets import resolve

        return resolve(model, lora)

    @classmethod
    def adapter_serving(cls, lora: LoraSpec) -> AdapterServing:
        from job.families.lora.targets import serving

        return serving(lora, reads_images=cls.reads_images)

    @staticmethod
    def write_served_adapter(adapter: Path, directory: Path) -> None:
        """The same files, under PEFT's names; no server has been asked whether it takes them."""
        shutil.copytree(adapter, directory, dirs_exist_ok=True)

    @staticmethod
    def set_router_aux_loss(model: "PreTrainedModel", coefficient: float | None) -> None:
        from job.families.load_balancing import set_aux_loss

        set_aux_loss(model, coefficient)

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
        weight_files.write(
            weights.through(functools.partial(transformers_format.stored, model)),
            directory,
            max_shard_size=max_shard_size,
            finished=finished,
        )
        return self.save_settings(directory, dtype=dtype, layout=layout)

    def save_settings(
        self, directory: Path, *, dtype: "torch.dtype", layout: Layout
    ) -> tuple[str, ...]:
        transformers_format.write_config(self._checkpoint.config, directory, dtype)
        self._writer.save_pretrained(directory)
        settings = generation_config.read(self._checkpoint)
        return generation_config.write(self._checkpoint.uri, settings, self.end_tokens, directory)

    # --- rows ------------------------------------------------------------------------------

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Where the checkpoint's own settings say, and where its template ends an answer."""
        answer = self._segments("the chat template", chat.PROBE)[-1].text
        named = generation_config.read(self._checkpoint).get("eos_token_id")
        own = named if isinstance(named, list) else [named]
        every = [self._tokens(answer)[-1], self.processor.tokenizer.eos_token_id, *own]
        return tuple(dict.fromkeys(token for token in every if token is not None))

    def encode(self, row: Row) -> Encoded:
        images = self._accept(row.id, row.messages, row.images)
        pending = list(images)
        text, ids, labels = "", list[int](), list[int]()
        for segment in self._segments(row.id, row.messages):
            piece = self._expanded(segment.text, pending)
            tokens = self._continued(text, ids, piece)
            text += piece
            ids += tokens
            labels += tokens if segment.answer else [IGNORED] * len(tokens)
        self._shown(row.id, pending)
        return Encoded(id=row.id, input_ids=tuple(ids), labels=tuple(labels), images=images)

    def encode_prompt(
        self,
        row_id: str,
        messages: Sequence[Message],
        images: Sequence[EncodedImage],
        *,
        enable_thinking: bool = False,
    ) -> Encoded:
        ordered = self._accept(row_id, messages, images)
        pending = list(ordered)
        template = functools.partial(self._template, enable_thinking=enable_thinking)
        text = chat.prompt(row_id, template, self._turns(messages))
        ids = self._tokens(self._expanded(text, pending))
        self._shown(row_id, pending)
        return Encoded(
            id=row_id, input_ids=tuple(ids), labels=(IGNORED,) * len(ids), images=ordered
        )

    def row_size(self, encoded: Encoded) -> RowSize:
        return RowSize(
            tokens=len(encoded.input_ids),
            image_tokens=sum(map(self.protects, encoded.input_ids)),
            trained=encoded.trained_tokens,
            patches=(),  # each architecture cuts pictures in its own way
        )

    @staticmethod
    def saved(config: Any, trained: Collection[str], rows: Sequence[RowSize], step: Step) -> None:
        """Nobody has worked out what a step of every architecture keeps."""
        return

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        from job.families import padding

        return self._with_images(padding.right(rows, self._filler), rows)

    def collate_prompts(self, rows: Sequence[Encoded]) -> Batch:
        from job.families import padding

        return self._with_images(padding.left(rows, self._filler), rows)

    def pack(self, rows: Sequence[Encoded]) -> Batch:
        raise NotImplementedError("the family packs no rows")

    @staticmethod
    def use_experts(model: "PreTrainedModel", name: str) -> None:
        if name == SORTED_EXPERTS:
            raise ValueError("it is written for the experts of ERNIE-4.5-VL")
        model.set_experts_implementation(name)

    @staticmethod
    def use_packed_step(model: "PreTrainedModel", *, by_bounds: bool = True) -> None:
        raise NotImplementedError("the family has no packed step")

    @property
    def _writer(self) -> Any:
        """What has the chat template: the processor, or the tokenizer alone."""
        return self.processor

    @property
    def _filler(self) -> int:
        """What fills a batch, unseen behind the mask; many checkpoints name no token for it."""
        pad = self.processor.tokenizer.pad_token_id
        return int(self.end_tokens[0] if pad is None else pad)

    def _segments(self, row_id: str, messages: Sequence[Message]) -> tuple[chat.Segment, ...]:
        return chat.segments(row_id, self._template, self._turns(messages), self._control, messages)

    def _tokens(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _continued(self, text: str, ids: list[int], piece: str) -> list[int]:
        """The tokens of `piece` after `text`, whose tokens are `ids`.

        As one text where that leaves those in front as they are: some tokenizers put a space before
        a piece that stands alone. Where a token would reach over the cut they are apart, as they
        are in generation.
        """
        together = self._tokens(text + piece)
        apart = together[: len(ids)] != ids
        return self._tokens(piece) if apart else together[len(ids) :]

    # --- what a family that reads images does otherwise --------------------------------------

    def protects(self, token: int) -> bool:
        return False

    def _turns(self, messages: Sequence[Message]) -> chat.Turns:
        return chat.turns(messages)

    def _template(
        self, turns: chat.Turns, *, add_generation_prompt: bool, enable_thinking: bool = False
    ) -> str:
        # Processors take what their template does not read for settings of their own.
        thinks = "enable_thinking" in str(self._writer.chat_template)
        settings = {"enable_thinking": enable_thinking} if thinks else {}
        return str(
            self._writer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **settings
            )
        )

    def _accept(
        self, row_id: str, messages: Sequence[Message], images: Sequence[EncodedImage]
    ) -> tuple[EncodedImage, ...]:
        """The images in the order in which the conversation mentions them; DataError for a row
        that the model cannot read."""
        self._control.refuse(row_id, messages)
        return chat.in_order(messages, images)

    def _expanded(self, text: str, pending: list[EncodedImage]) -> str:
        """The text with each image's tokens in its place; takes the images from `pending`."""
        return text

    def _shown(self, row_id: str, pending: Sequence[EncodedImage]) -> None:
        """Raises DataError for images that the template has not shown."""

    def _with_images(self, batch: Batch, rows: Sequence[Encoded]) -> Batch:
        return batch

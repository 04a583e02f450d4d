"""The base of families whose checkpoints Transformers' `Auto` classes read and write.

Their published file layout is Transformers' own, which vLLM reads too: both layouts of an export
are identical.
"""

import functools
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError
from job.families import (
    chat,
    chat_template,
    generation_config,
    tokenizer_files,
    transformers_format,
)
from job.families.activation_memory import StepSettings
from job.families.base import SORTED_EXPERTS, Checkpoint, Decoder, Layout, Processor
from job.families.batches import PackedBatch, PaddedBatch
from job.families.bound import BoundFamily
from job.families.encoded import Encoded, RowSize
from job.families.four_bit import FourBit
from job.families.lora.target_groups import AdapterServing, LoraTargets
from job.families.packed_shape import PackedShape
from job.families.step_flops import ForwardFlops, forward_flops
from job.families.weight_files import NamedTensor
from job.prep.rows import EncodedImage, Message
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import (
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )
    from transformers.models.auto.auto_factory import _BaseAutoModelClass as AutoClass


class AutoFamily(BoundFamily):
    """A model of one of Transformers' `Auto` classes, bound to its processor.

    A subclass defines `name`, `recognizes`, `bind`, and how it handles images.
    """

    name: str
    auto: str
    """The name of the `Auto` class."""
    reads_images: bool
    supports_packing = False
    experts_on_gpu = "grouped_mm"
    vllm_arguments: tuple[str, ...] = ()
    vllm_adapter_arguments: tuple[str, ...] = ()
    served_empty_thoughts: str = ""

    def __init__(self, checkpoint: Checkpoint, processor: Processor) -> None:
        super().__init__(checkpoint, processor)
        if self._processing_class.chat_template is None:
            raise InputError(
                checkpoint.uri,
                "has no chat template",
                fix="set model.chat_template, or add the model's chat_template.jinja to its folder",
            )

    # --- Recognition -----------------------------------------------------------------------

    @staticmethod
    def known_config(uri: str) -> dict[str, Any] | None:
        return None

    @staticmethod
    def control_tokens(directory: Path) -> frozenset[str]:
        return tokenizer_files.control_tokens(directory)

    # --- ModelBuilding ---------------------------------------------------------------------

    @classmethod
    def architecture(cls, uri: str, config: dict[str, Any]) -> "PreTrainedModel":
        import torch

        with torch.device("meta"):
            return cls._auto().from_config(cls._config(uri, config), trust_remote_code=False)

    def configuration(self) -> "PreTrainedConfig":
        return self._config(self._checkpoint.uri, self._checkpoint.config)

    def load(
        self,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
        four_bit: FourBit | None = None,
    ) -> "PreTrainedModel":
        return transformers_format.load(
            self._auto(),
            self._checkpoint.uri,
            self._checkpoint.directory,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            four_bit=four_bit,
        )

    @classmethod
    def _auto(cls) -> "type[AutoClass]":
        import transformers

        return getattr(transformers, cls.auto)

    @classmethod
    def _config(cls, uri: str, config: dict[str, Any]) -> "PreTrainedConfig":
        return transformers_format.configuration(cls._auto(), uri, config)

    @classmethod
    def _from_config(cls) -> "Callable[..., PreTrainedModel]":
        return cls._auto().from_config

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        return False  # even parameters that Transformers keeps in fp32 have the checkpoint's dtype

    @staticmethod
    def set_experts_implementation(model: "PreTrainedModel", name: str) -> None:
        if name == SORTED_EXPERTS:
            raise ValueError("it supports the experts of ERNIE-4.5-VL only")
        model.set_experts_implementation(name)

    @staticmethod
    def set_router_aux_loss(model: "PreTrainedModel", coefficient: float | None) -> None:
        from job.families.load_balancing import set_aux_loss

        set_aux_loss(model, coefficient)

    # --- RowEncoding -----------------------------------------------------------------------

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """End tokens of the chat template, the tokenizer and the checkpoint's generation config."""
        named = generation_config.read(self._checkpoint).get("eos_token_id")
        own = named if isinstance(named, list) else [named]
        every = [self._template_end_token(), self.processor.tokenizer.eos_token_id, *own]
        return tuple(dict.fromkeys(token for token in every if token is not None))

    def is_image_token(self, token: int) -> bool:
        return False

    def collate(self, rows: Sequence[Encoded]) -> PaddedBatch:
        from job.families import padding

        return self._with_images(padding.right(rows, self._padding_token), rows)

    def collate_prompts(self, rows: Sequence[Encoded]) -> PaddedBatch:
        from job.families import padding

        return self._with_images(padding.left(rows, self._padding_token), rows)

    @property
    def _processing_class(self) -> "ProcessorMixin | PreTrainedTokenizerBase":
        """The owner of the chat template: the processor, or the tokenizer if there is none."""
        return self.processor

    @property
    def _padding_token(self) -> int:
        """The tokenizer's, or any other: many checkpoints have none, and padding is masked."""
        pad = self.processor.tokenizer.pad_token_id
        return int(self.end_tokens[0] if pad is None else pad)

    def _set_chat_template(self, template: str) -> None:
        self._processing_class.chat_template = template
        self.processor.tokenizer.chat_template = template

    def _turns(self, messages: Sequence[Message]) -> chat.Turns:
        return chat.turns(messages)

    def _render_template(
        self, turns: chat.Turns, *, add_generation_prompt: bool, enable_thinking: bool = False
    ) -> str:
        owner = self._processing_class
        settings = chat.thinking(owner.chat_template, enabled=enable_thinking)
        return str(
            owner.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **settings
            )
        )

    def _tokenize(self, texts: Iterable[str], images: list[EncodedImage]) -> Iterator[list[int]]:
        before, ids = "", list[int]()
        for text in texts:
            expanded = self._expand_images(text, images)
            tokens = self._continue(before, ids, expanded)
            before += expanded
            ids += tokens
            yield tokens

    def _continue(self, before: str, ids: list[int], text: str) -> list[int]:
        """The tokens of `text`, which continues `before`, whose tokens are `ids`.

        Both are tokenized as one text, because some tokenizers prepend a space to every text. If
        that changes `ids`, because a token spans the boundary, `text` is tokenized alone, as in
        generation.
        """
        together = self._tokens(before + text)
        spans_cut = together[: len(ids)] != ids
        return self._tokens(text) if spans_cut else together[len(ids) :]

    def _expand_images(self, text: str, images: list[EncodedImage]) -> str:
        """The text with each image placeholder expanded; removes the images from the list."""
        return text

    def _with_images(self, batch: PaddedBatch, rows: Sequence[Encoded]) -> PaddedBatch:
        return batch

    # --- PackedTraining --------------------------------------------------------------------

    def pack(
        self,
        rows: Sequence[Encoded],
        bucket: PackedShape | None = None,
        *,
        images_once: bool = False,
    ) -> PackedBatch:
        raise NotImplementedError("the family has no packed step")

    def bucket(self, shapes: Sequence[PackedShape]) -> PackedShape:
        raise NotImplementedError("the family has no packed step")

    @staticmethod
    def use_packed_step(model: "PreTrainedModel", *, varlen: bool = True) -> None:
        raise NotImplementedError("the family has no packed step")

    @staticmethod
    def try_packed_step(model: "PreTrainedModel | PeftModel") -> bool:
        return False

    # --- Generation ------------------------------------------------------------------------

    @staticmethod
    def has_decoder(model: "PreTrainedModel | PeftModel") -> bool:
        return False

    def decoder(
        self, model: "PreTrainedModel | PeftModel", *, slots: int, capacity: int
    ) -> Decoder:
        raise NotImplementedError("the family has no decoder")

    # --- LoraSupport, MemoryEstimate and ComputeEstimate ----------------------------------

    @staticmethod
    def lora_targets(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
        from job.families.lora.targets import resolve

        return resolve(model, lora)

    @staticmethod
    def activation_memory(
        config: "PreTrainedConfig",
        trained: Collection[str],
        rows: Sequence[RowSize],
        step: StepSettings,
    ) -> None:
        """None: the architecture is unknown."""
        return

    @staticmethod
    def forward_flops(model: "PreTrainedModel", rows: Sequence[RowSize]) -> ForwardFlops:
        return forward_flops(model, rows)

    # --- CheckpointWriting -----------------------------------------------------------------

    def _to_checkpoint_format(
        self, model: "PreTrainedModel"
    ) -> Callable[[Iterable[NamedTensor]], Iterable[NamedTensor]]:
        return functools.partial(transformers_format.stored, model)

    def save_processor(self, directory: Path) -> None:
        tokenizer_files.save(self._processing_class, directory)

    def write_chat_template(self, directory: Path, *, layout: Layout) -> None:
        (directory / chat_template.FILE).write_text(
            str(self._processing_class.chat_template), encoding="utf-8"
        )

    def save_settings(
        self, directory: Path, *, dtype: "torch.dtype", layout: Layout
    ) -> tuple[str, ...]:
        transformers_format.write_config(self._checkpoint.config, directory, dtype)
        self.save_processor(directory)
        settings = generation_config.read(self._checkpoint)
        return generation_config.write(self._checkpoint.uri, settings, self.end_tokens, directory)

    @staticmethod
    def own_layout(config: dict[str, Any]) -> Layout | None:
        return None

    # --- Serving ---------------------------------------------------------------------------

    @classmethod
    def adapter_serving(cls, lora: LoraSpec) -> AdapterServing:
        from job.families.lora.targets import serving

        return serving(lora, reads_images=cls.reads_images)

    @staticmethod
    def write_served_adapter(adapter: Path, directory: Path) -> None:
        """Copies PEFT's files; not tested against a server."""
        shutil.copytree(adapter, directory, dirs_exist_ok=True)

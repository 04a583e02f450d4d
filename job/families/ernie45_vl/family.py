"""ERNIE-4.5-VL: the native `ernie4_5_vl_moe` classes of Transformers, without remote code.

A checkpoint in the published layout is translated when it is bound; all else sees one kind.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError
from job.families import chat
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
    Saved,
    Step,
)
from job.families.ernie45_vl.published_format.config import MODEL_TYPE as PUBLISHED
from job.families.ernie45_vl.published_format.config import NATIVE_MODEL_TYPE as NATIVE
from job.families.ernie45_vl.published_format.config import to_nested
from job.families.weight_files import Weights
from job.prep.rows import EncodedImage, Message, Row
from job.spec.types import DataSpec, LoraSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Router gates and their correction bias decide by small differences; every layout keeps them fp32.
_FP32 = re.compile(r"mlp\.(text_moe|vision_moe)\.gate\.")

EMPTY_THOUGHT = "\n"


class Ernie45VL:
    """The family bound to one checkpoint."""

    name = "ernie45_vl"
    reads_images = True
    packs = True
    experts_on_gpu = SORTED_EXPERTS
    # The code is that of the two small modules that `save` writes.
    served_with: tuple[str, ...] = ("--trust-remote-code",)
    adapter_served_with: tuple[str, ...] = ("--lora-target-modules", "qkv_proj", "o_proj")

    def __init__(self, checkpoint: Checkpoint, processor: Any) -> None:
        self._checkpoint = checkpoint
        self.processor = processor
        self._control = chat.Control.of(processor.tokenizer)

    @staticmethod
    def recognises(config: dict[str, Any]) -> bool:
        return config.get("model_type") in (PUBLISHED, NATIVE)

    @staticmethod
    def known(uri: str) -> dict[str, Any] | None:
        from job.families.ernie45_vl.published_configs import config

        return config(uri)

    @staticmethod
    def control_tokens(directory: Path) -> frozenset[str]:
        from job.families.ernie45_vl.published_format import tokenizer

        return tokenizer.control_tokens(directory)

    @staticmethod
    def architecture(uri: str, config: dict[str, Any]) -> "PreTrainedModel":
        import torch
        from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

        with torch.device("meta"):
            return Ernie4_5_VLMoeForConditionalGeneration(
                Ernie4_5_VLMoeConfig.from_dict(_nested(uri, config))
            )

    @classmethod
    def bind(cls, checkpoint: Checkpoint, data: DataSpec) -> "Ernie45VL":
        from transformers import Ernie4_5_VLMoeProcessor

        if checkpoint.config.get("model_type") == PUBLISHED:
            checkpoint, processor = _translated(checkpoint)
            return cls(checkpoint, _with_limits(processor, data))
        try:
            processor = Ernie4_5_VLMoeProcessor.from_pretrained(checkpoint.directory)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                checkpoint.uri,
                f"its processor cannot be read: {error}",
                fix="it needs processor_config.json, tokenizer.json and chat_template.jinja",
            ) from error
        return cls(checkpoint, _with_limits(processor, data))

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokenizer's own end token, and the one with which the template ends an answer.

        They differ in the published checkpoints, where only the second is trained.
        """
        tokenizer = self.processor.tokenizer
        answer = self._segments("the chat template", chat.PROBE)[-1].text
        last = tokenizer(answer, add_special_tokens=False)["input_ids"][-1]
        return tuple(dict.fromkeys([tokenizer.eos_token_id, last]))

    # --- the model -------------------------------------------------------------------------

    def load(
        self, *, dtype: "torch.dtype", device: "torch.device", **kwargs: Any
    ) -> "PreTrainedModel":
        from transformers import Ernie4_5_VLMoeForConditionalGeneration

        from job.families.ernie45_vl.published_format.weights import require_complete

        directory = self._checkpoint.directory
        require_complete(self._checkpoint.uri, directory, self.skeleton())
        model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
            directory,
            config=self.configuration(),
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            **kwargs,
        )
        for parameter in model.parameters():
            # Both sets of correction biases are stored as one tensor, and would be views of it:
            # safetensors refuses to write those when all weights are trained.
            if parameter.untyped_storage().nbytes() != parameter.nbytes:
                parameter.data = parameter.data.clone()
        return self._with_packed_vision(model.eval())

    def initialise(
        self, *, seed: int, dtype: "torch.dtype", device: "torch.device", **kwargs: Any
    ) -> "PreTrainedModel":
        from transformers import Ernie4_5_VLMoeForConditionalGeneration

        from job.families.random_init import initialised

        model = initialised(
            Ernie4_5_VLMoeForConditionalGeneration._from_config,
            self.configuration(),
            seed=seed,
            dtype=dtype,
            device=device,
            keeps_fp32=self.keeps_fp32,
            **kwargs,
        )
        return self._with_packed_vision(model)

    @staticmethod
    def _with_packed_vision(model: "PreTrainedModel") -> "PreTrainedModel":
        from job.families.ernie45_vl.vision_attention import use_packed_vision_attention

        if model.config.vision_config._attn_implementation == "sdpa":
            use_packed_vision_attention(model)
        return model

    def skeleton(self) -> "PreTrainedModel":
        return self.architecture(self._checkpoint.uri, self._checkpoint.config)

    def configuration(self) -> Any:
        from transformers import Ernie4_5_VLMoeConfig

        return Ernie4_5_VLMoeConfig.from_dict(copy.deepcopy(self._checkpoint.config))

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        return bool(_FP32.search(name))

    @staticmethod
    def lora_targets(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
        from job.families.ernie45_vl.lora_targets import resolve

        return resolve(model, lora)

    @staticmethod
    def adapter_serving(lora: LoraSpec) -> AdapterServing:
        from job.families.ernie45_vl.lora_targets import serving

        return serving(lora)

    @staticmethod
    def write_served_adapter(adapter: Path, directory: Path) -> None:
        from job.families.ernie45_vl.published_format.adapter import write

        write(adapter, directory)

    @staticmethod
    def set_router_aux_loss(model: "PreTrainedModel", coefficient: float | None) -> None:
        if coefficient is not None:
            model.router_aux_loss_coef = coefficient
        model.config.text_config.output_router_logits = model.router_aux_loss_coef != 0

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
        from job.families import weight_files
        from job.families.ernie45_vl.published_format.weights import published

        # Both layouts have the published names of weights, which Transformers reads and writes.
        weight_files.write(
            weights.through(published),
            directory,
            max_shard_size=max_shard_size,
            finished=finished,
        )
        return self.save_settings(directory, dtype=dtype, layout=layout)

    def save_settings(
        self, directory: Path, *, dtype: "torch.dtype", layout: Layout
    ) -> tuple[str, ...]:
        from job.families import generation_config
        from job.families.ernie45_vl.published_format import config, processor

        name = str(dtype).removeprefix("torch.")
        if layout == "vllm":
            written = {
                **config.to_flat(self._checkpoint.config),
                "auto_map": processor.AUTO_MAP,
                "dtype": name,
            }
            processor.write(self.processor, directory)
        else:
            written = {**self._checkpoint.config, "dtype": name}
            for section in ("text_config", "vision_config"):
                written[section] = {**written[section], "dtype": name}
            self.processor.save_pretrained(directory)
        path = directory / "config.json"
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        settings = generation_config.read(self._checkpoint) or _generation(self.configuration())
        return generation_config.write(self._checkpoint.uri, settings, self.end_tokens, directory)

    # --- rows ------------------------------------------------------------------------------

    def encode(self, row: Row) -> Encoded:
        self._control.refuse(row.id, row.messages)
        images = chat.in_order(row.messages, row.images)
        pending = iter(images)
        ids: list[int] = []
        labels: list[int] = []
        for segment in self._segments(row.id, row.messages):
            tokens = self._tokenize(segment.text, pending)
            ids += tokens
            labels += tokens if segment.answer else [IGNORED] * len(tokens)
        return Encoded(id=row.id, input_ids=tuple(ids), labels=tuple(labels), images=images)

    def encode_prompt(
        self,
        row_id: str,
        messages: Sequence[Message],
        images: Sequence[EncodedImage],
        *,
        enable_thinking: bool = False,
    ) -> Encoded:
        self._control.refuse(row_id, messages)
        ordered = chat.in_order(messages, images)
        template = functools.partial(self._template, enable_thinking=enable_thinking)
        ids = self._tokenize(chat.prompt(row_id, template, _turns(messages)), iter(ordered))
        return Encoded(
            id=row_id, input_ids=tuple(ids), labels=(IGNORED,) * len(ids), images=ordered
        )

    def protects(self, token: int) -> bool:
        """Whether truncation must keep this token: an image's tokens stay whole."""
        processor = self.processor
        return token in (
            processor.image_token_id,
            processor.image_start_token_id,
            processor.image_end_token_id,
        )

    def row_size(self, encoded: Encoded) -> RowSize:
        merge = self.processor.image_processor.merge_size**2
        return RowSize(
            tokens=len(encoded.input_ids),
            image_tokens=sum(map(self.protects, encoded.input_ids)),
            trained=encoded.trained_tokens,
            patches=tuple(self._image_tokens(image) * merge for image in encoded.images),
        )

    @staticmethod
    def saved(config: Any, trained: Collection[str], rows: Sequence[RowSize], step: Step) -> Saved:
        from job.families.ernie45_vl.activation_memory import saved

        return saved(config, trained, rows, step)

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        from job.families.ernie45_vl.collate import collate

        return collate(rows, self.processor)

    def pack(self, rows: Sequence[Encoded]) -> Batch:
        from job.families.ernie45_vl.packed.batch import pack

        return pack(rows, self.processor)

    @staticmethod
    def use_experts(model: "PreTrainedModel", name: str) -> None:
        if name == SORTED_EXPERTS:
            from job.families.ernie45_vl.packed.experts import register

            register()
        model.set_experts_implementation(name)

    @staticmethod
    def use_packed_step(model: "PreTrainedModel", *, by_bounds: bool = True) -> None:
        from job.families.ernie45_vl.packed.model import use_packed_step

        use_packed_step(model, by_bounds=by_bounds)

    def collate_prompts(self, rows: Sequence[Encoded]) -> Batch:
        from job.families.ernie45_vl.collate import collate_prompts

        return collate_prompts(rows, self.processor)

    def _segments(self, row_id: str, messages: Sequence[Message]) -> tuple[chat.Segment, ...]:
        return chat.segments(row_id, self._template, _turns(messages), self._control, messages)

    def _template(
        self,
        turns: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        enable_thinking: bool = False,
    ) -> str:
        return self.processor.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
        )

    def _tokenize(self, text: str, images: Any) -> list[int]:
        """The text's tokens, each image's placeholder as often as the image has tokens."""
        image_token = self.processor.image_token_id
        ids: list[int] = []
        for token in self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids += [token] * (self._image_tokens(next(images)) if token == image_token else 1)
        return ids

    def _image_tokens(self, image: EncodedImage) -> int:
        processor = self.processor.image_processor
        limits = {
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
        }
        patches = processor.get_number_of_image_patches(image.height, image.width, limits)
        return int(patches // processor.merge_size**2)


def _turns(messages: Sequence[Message]) -> chat.Turns:
    """An answer follows an empty thinking block, as `enable_thinking: false` generates it."""
    return chat.turns(messages, reasoning_content=EMPTY_THOUGHT)


def _generation(config: Any) -> dict[str, Any]:
    """What Transformers generates by if a checkpoint says nothing."""
    from transformers import GenerationConfig

    found: dict[str, Any] = GenerationConfig.from_model_config(config).to_diff_dict()
    return found


def _nested(uri: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as Transformers has it, from either layout."""
    if config.get("model_type") != PUBLISHED:
        return copy.deepcopy(config)
    try:
        return to_nested(config)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            uri,
            f"its config.json cannot be read as ERNIE-4.5-VL: {type(error).__name__}: {error}",
        ) from error


def _translated(checkpoint: Checkpoint) -> tuple[Checkpoint, Any]:
    """A published checkpoint with its config as Transformers has it, and its processor."""
    from job.families.ernie45_vl.published_format import processor

    config = _nested(checkpoint.uri, checkpoint.config)
    read = processor.read(checkpoint.uri, checkpoint.directory)
    # The published form has no field for the video's placeholder; servers use the image's.
    config.setdefault("video_token_id", read.video_token_id)
    return replace(checkpoint, config=config), read


def _with_limits(processor: Any, data: DataSpec) -> Any:
    """The processor with the spec's limits on the size of pictures."""
    size = dict(processor.image_processor.size)
    if data.min_pixels is not None:
        size["shortest_edge"] = data.min_pixels
    if data.max_pixels is not None:
        size["longest_edge"] = data.max_pixels
    processor.image_processor.size = type(processor.image_processor.size)(**size)
    return processor

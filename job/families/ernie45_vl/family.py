"""The ERNIE-4.5-VL family.

Binding converts a checkpoint in the published layout; all other code sees Transformers' layout.
"""

import copy
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.families import chat, chat_template, tokenizer_files
from job.families.activation_memory import ActivationMemory, StepSettings
from job.families.base import SORTED_EXPERTS, Checkpoint, Layout
from job.families.batches import PackedBatch, PaddedBatch
from job.families.bound import BoundFamily
from job.families.encoded import Encoded, RowSize
from job.families.ernie45_vl import checkpoint_files
from job.families.ernie45_vl.published_format.config import MODEL_TYPE as PUBLISHED
from job.families.ernie45_vl.published_format.config import NATIVE_MODEL_TYPE as NATIVE
from job.families.ernie45_vl.published_format.placeholders import to_native, to_published
from job.families.four_bit import FourBit
from job.families.lora.target_groups import AdapterServing, LoraTargets
from job.families.packed_shape import PackedShape
from job.families.step_flops import ForwardFlops
from job.families.transformers_format import attention_arguments
from job.families.weight_files import NamedTensor
from job.prep.rows import EncodedImage, Message
from job.spec.types import DataSpec, LoraSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeProcessor, PreTrainedModel

    from job.families.ernie45_vl.packed.decoder import PackedDecoder

# Routing depends on small differences: gates and correction biases are always fp32.
_FP32 = re.compile(r"mlp\.(text_moe|vision_moe)\.gate\.")

EMPTY_THOUGHT = "\n"
"""The content of the thinking block before every answer, as with `enable_thinking: false`."""


class Ernie45VL(BoundFamily):
    """The family bound to one checkpoint."""

    name = "ernie45_vl"
    reads_images = True
    supports_packing = True
    experts_on_gpu = SORTED_EXPERTS
    processor: "Ernie4_5_VLMoeProcessor"
    # The remote code is two small modules of this project, which `save_settings` writes.
    vllm_arguments: tuple[str, ...] = ("--trust-remote-code",)
    vllm_adapter_arguments: tuple[str, ...] = ("--lora-target-modules", "qkv_proj", "o_proj")
    served_empty_thoughts: str = EMPTY_THOUGHT

    # --- Recognition -----------------------------------------------------------------------

    @staticmethod
    def recognizes(config: dict[str, Any]) -> bool:
        return config.get("model_type") in (PUBLISHED, NATIVE)

    @staticmethod
    def known_config(uri: str) -> dict[str, Any] | None:
        from job.families.ernie45_vl.published_configs import config

        return config(uri)

    @staticmethod
    def control_tokens(directory: Path) -> frozenset[str]:
        from job.families.ernie45_vl.published_format import tokenizer

        return tokenizer.control_tokens(directory)

    @classmethod
    def bind(cls, checkpoint: Checkpoint, data: DataSpec) -> "Ernie45VL":
        checkpoint, processor = checkpoint_files.read(checkpoint)
        checkpoint_files.set_pixel_limits(processor, data)
        return cls(checkpoint, processor)

    # --- ModelBuilding ---------------------------------------------------------------------

    @staticmethod
    def architecture(uri: str, config: dict[str, Any]) -> "PreTrainedModel":
        import torch
        from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

        with torch.device("meta"):
            return Ernie4_5_VLMoeForConditionalGeneration(
                Ernie4_5_VLMoeConfig.from_dict(checkpoint_files.nested_config(uri, config))
            )

    def configuration(self) -> "Ernie4_5_VLMoeConfig":
        from transformers import Ernie4_5_VLMoeConfig

        return Ernie4_5_VLMoeConfig.from_dict(copy.deepcopy(self._checkpoint.config))

    def load(
        self,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
        four_bit: FourBit | None = None,
    ) -> "PreTrainedModel":
        import torch
        from transformers import Ernie4_5_VLMoeForConditionalGeneration

        from job.families.ernie45_vl.published_format.weights import require_complete
        from job.families.four_bit.quantizer import as_loaded_plainly, quantization_arguments

        directory = self._checkpoint.directory
        require_complete(self._checkpoint.uri, directory, self.meta_model())
        model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
            directory,
            config=self.configuration(),
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            **attention_arguments(attn_implementation),
            **quantization_arguments(four_bit),
        )
        as_loaded_plainly(model)
        for parameter in model.parameters():
            # The two correction biases of a layer are stored as one tensor, and loaded as views of
            # it, which safetensors would refuse to write after full fine-tuning.
            packed = type(parameter) is not torch.nn.Parameter
            if not packed and parameter.untyped_storage().nbytes() != parameter.nbytes:
                parameter.data = parameter.data.clone()
        return _with_packed_vision(model.eval())

    def without_weights(
        self,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
    ) -> "PreTrainedModel":
        from job.families.ernie45_vl.published_format.weights import require_complete

        checkpoint = self._checkpoint
        require_complete(checkpoint.uri, checkpoint.directory, self.meta_model())
        model = super().without_weights(
            dtype=dtype, device=device, attn_implementation=attn_implementation
        )
        return _with_packed_vision(model)

    def initialize(
        self,
        *,
        seed: int,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
    ) -> "PreTrainedModel":
        model = super().initialize(
            seed=seed, dtype=dtype, device=device, attn_implementation=attn_implementation
        )
        return _with_packed_vision(model)

    @staticmethod
    def _from_config() -> "Callable[..., PreTrainedModel]":
        from transformers import Ernie4_5_VLMoeForConditionalGeneration

        return Ernie4_5_VLMoeForConditionalGeneration._from_config

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        return bool(_FP32.search(name))

    @staticmethod
    def set_experts_implementation(model: "PreTrainedModel", name: str) -> None:
        if name == SORTED_EXPERTS:
            from job.families.ernie45_vl.packed.experts import register
            from job.families.grouped_products.choice import choose

            register()
            choose(model.device, model.dtype)  # before the first step: trying waits for the device
        model.set_experts_implementation(name)

    @staticmethod
    def set_router_aux_loss(model: "PreTrainedModel", coefficient: float | None) -> None:
        if coefficient is not None:
            model.router_aux_loss_coef = coefficient
        model.config.text_config.output_router_logits = model.router_aux_loss_coef != 0

    # --- RowEncoding -----------------------------------------------------------------------

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """The end tokens of the tokenizer and the chat template.

        They differ in the published checkpoints, which are trained to generate the template's.
        """
        own = self.processor.tokenizer.eos_token_id
        return tuple(dict.fromkeys([own, self._template_end_token()]))

    def is_image_token(self, token: int) -> bool:
        processor = self.processor
        return token in (
            processor.image_token_id,
            processor.image_start_token_id,
            processor.image_end_token_id,
        )

    def collate(self, rows: Sequence[Encoded]) -> PaddedBatch:
        from job.families.ernie45_vl.collate import collate

        return collate(rows, self.processor)

    def collate_prompts(self, rows: Sequence[Encoded]) -> PaddedBatch:
        from job.families.ernie45_vl.collate import collate_prompts

        return collate_prompts(rows, self.processor)

    def _set_chat_template(self, template: str) -> None:
        self.processor.chat_template = to_native(template)

    @property
    def _image_placeholder(self) -> str:
        return self.processor.tokenizer.convert_ids_to_tokens(self.processor.image_token_id)

    def _turns(self, messages: Sequence[Message]) -> chat.Turns:
        return chat.turns(messages, reasoning_content=EMPTY_THOUGHT)

    def _render_template(
        self, turns: chat.Turns, *, add_generation_prompt: bool, enable_thinking: bool = False
    ) -> str:
        settings = chat.thinking(self.processor.chat_template, enabled=enable_thinking)
        return self.processor.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **settings
        )

    def _tokenize(self, texts: Iterable[str], images: list[EncodedImage]) -> Iterator[list[int]]:
        """Repeats each image placeholder once per token of the image."""
        placeholder = self.processor.image_token_id
        for text in texts:
            ids = list[int]()
            for token in self._tokens(text):
                is_image = token == placeholder
                count = self._image_tokens(self._next_image(images)) if is_image else 1
                ids += [token] * count
            yield ids

    def _image_tokens(self, image: EncodedImage) -> int:
        processor = self.processor.image_processor
        limits = {
            "min_pixels": processor.size["shortest_edge"],
            "max_pixels": processor.size["longest_edge"],
        }
        patches = processor.get_number_of_image_patches(image.height, image.width, limits)
        return int(patches // processor.merge_size**2)

    def _patches(self, images: Sequence[EncodedImage]) -> tuple[int, ...]:
        merge = self.processor.image_processor.merge_size**2
        return tuple(self._image_tokens(image) * merge for image in images)

    # --- PackedTraining --------------------------------------------------------------------

    def pack(
        self,
        rows: Sequence[Encoded],
        bucket: PackedShape | None = None,
        *,
        images_once: bool = False,
    ) -> PackedBatch:
        from job.families.ernie45_vl.packed.batch import pack

        return pack(rows, self.processor, bucket, images_once=images_once)

    def bucket(self, shapes: Sequence[PackedShape]) -> PackedShape:
        from job.families.ernie45_vl.packed.padding import bucket

        merge: int = self.processor.image_processor.merge_size
        return bucket(shapes, merged_patches=merge**2)

    @staticmethod
    def use_packed_step(model: "PreTrainedModel", *, varlen: bool = True) -> None:
        from job.families.ernie45_vl.packed.model import use_packed_step

        use_packed_step(model, varlen=varlen)

    @staticmethod
    def try_packed_step(model: "PreTrainedModel | PeftModel") -> bool:
        from job.families.ernie45_vl.packed.model import packed_base

        return packed_base(model) is not None

    # --- Generation ------------------------------------------------------------------------

    @staticmethod
    def has_decoder(model: "PreTrainedModel | PeftModel") -> bool:
        from job.families.ernie45_vl.packed.model import packed_base

        return packed_base(model) is not None

    def decoder(
        self, model: "PreTrainedModel | PeftModel", *, slots: int, capacity: int
    ) -> "PackedDecoder":
        from job.families.ernie45_vl.packed.decoder import PackedDecoder
        from job.families.ernie45_vl.packed.model import packed_base

        base = packed_base(model)
        assert base is not None, "see has_decoder"
        return PackedDecoder(base, self.processor, slots=slots, capacity=capacity)

    # --- LoraSupport, MemoryEstimate and ComputeEstimate ----------------------------------

    @staticmethod
    def lora_targets(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
        from job.families.ernie45_vl.lora_targets import resolve

        return resolve(model, lora)

    @staticmethod
    def activation_memory(
        config: "Ernie4_5_VLMoeConfig",
        trained: Collection[str],
        rows: Sequence[RowSize],
        step: StepSettings,
    ) -> ActivationMemory:
        from job.families.ernie45_vl.activation_memory import activation_memory

        return activation_memory(config, trained, rows, step)

    @staticmethod
    def forward_flops(model: "PreTrainedModel", rows: Sequence[RowSize]) -> ForwardFlops:
        from job.families.ernie45_vl.step_flops import forward_flops

        return forward_flops(model.config, rows)

    # --- CheckpointWriting -----------------------------------------------------------------

    def _to_checkpoint_format(
        self, model: "PreTrainedModel"
    ) -> Callable[[Iterable[NamedTensor]], Iterable[NamedTensor]]:
        """Both layouts use the published names, which Transformers reads and writes too."""
        from job.families.ernie45_vl.published_format.weights import published

        return published

    def save_processor(self, directory: Path) -> None:
        tokenizer_files.save(self.processor, directory)

    def write_chat_template(self, directory: Path, *, layout: Layout) -> None:
        template = self.processor.chat_template
        written = to_published(template) if layout == "vllm" else template
        (directory / chat_template.FILE).write_text(written, encoding="utf-8")

    def save_settings(
        self, directory: Path, *, dtype: "torch.dtype", layout: Layout
    ) -> tuple[str, ...]:
        from job.families import generation_config

        checkpoint_files.write(self._checkpoint, self.processor, directory, dtype, layout)
        settings = generation_config.read(self._checkpoint) or generation_config.defaults(
            self.configuration()
        )
        return generation_config.write(self._checkpoint.uri, settings, self.end_tokens, directory)

    # --- Serving ---------------------------------------------------------------------------

    @staticmethod
    def adapter_serving(lora: LoraSpec) -> AdapterServing:
        from job.families.ernie45_vl.lora_targets import serving

        return serving(lora)

    @staticmethod
    def own_layout(config: dict[str, Any]) -> Layout | None:
        return "vllm" if config.get("model_type") == PUBLISHED else "transformers"

    @staticmethod
    def write_served_adapter(adapter: Path, directory: Path) -> None:
        from job.families.ernie45_vl.published_format.adapter import write

        write(adapter, directory)


def _with_packed_vision(model: "PreTrainedModel") -> "PreTrainedModel":
    from job.families.ernie45_vl.vision_attention import use_packed_vision_attention

    if model.config.vision_config._attn_implementation == "sdpa":
        use_packed_vision_attention(model)
    return model

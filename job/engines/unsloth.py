"""The Unsloth engine: its rewritten forward passes, its LoRA layers and its loss.

Everything else is shared with the default engine: the family reads the weights, PEFT writes the
adapter, and the `Trainer` is the same.
"""

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.engines.lora_config import adapter_settings
from job.engines.transformers import TransformersEngine
from job.engines.unsloth_patches import quiet
from job.errors import SpecError
from job.families.base import Family
from job.families.lora.target_groups import LoraTargets
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class UnslothEngine(TransformersEngine):
    """Requires that `job.engines.unsloth_patches` has imported the library in this process."""

    name: str = "unsloth"
    patches_forward: bool = True

    def load(self, family: Family, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        if dtype is not None:  # not for training: the export's verification
            return super().load(family, dtype)
        from unsloth import FastModel

        with tempfile.TemporaryDirectory() as directory, quiet():
            # Unsloth derives the architecture from these files, and rewrites its classes first.
            family.configuration().save_pretrained(directory)
            family.processor.tokenizer.save_pretrained(directory)
            model, _ = FastModel.from_pretrained(
                directory,
                auto_model=_loader(family, self.dtype, self.device, self._attention()),
                dtype=self.dtype,
                device_map={"": self.device},
                load_in_4bit=False,
                load_in_16bit=True,
                use_gradient_checkpointing=False,  # the Trainer enables it if the spec does
                offload_embedding=False,
                use_exact_model_name=True,  # else Unsloth may substitute its own checkpoint
                local_files_only=True,
                **self._attention(),
            )
        return self.prepare(model.eval(), family)

    def attach_adapter(
        self, model: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec, seed: int
    ) -> "PeftModel":
        import torch
        from unsloth import FastModel

        if targets.gate_up:  # its adapters have one rank
            raise SpecError(
                "$.lora",
                "selects routed experts, for which unsloth trains no adapters in this version",
                value=targets.gate_up[0],
                fix="set lora.finetune_experts: false, or model.engine: transformers",
            )
        # PEFT initializes on the CPU: this seed gives the same adapter as in the default engine.
        with torch.random.fork_rng(devices=[]), quiet():
            adapted: PeftModel = FastModel.get_peft_model(
                model,
                **adapter_settings(targets, lora),
                target_parameters=list(targets.parameters),  # None would let Unsloth add experts
                use_gradient_checkpointing=False,
                random_state=seed,
            )
        config = adapted.peft_config[adapted.active_adapter]
        config.auto_mapping = None  # as in all adapters with a task type
        config.target_parameters = config.target_parameters or None
        return adapted

    def prepare(self, model: "PreTrainedModel", family: Family) -> "PreTrainedModel":
        if self.model.experts_implementation == "auto":  # Unsloth has its own
            return model.requires_grad_(False)
        return super().prepare(model, family)


def _loader(
    family: Family, dtype: "torch.dtype", device: "torch.device", attention: dict[str, Any]
) -> type:
    """The auto class with which Unsloth loads the model: it delegates to the family.

    The family knows the published layouts, and rejects incomplete checkpoints.
    """
    import transformers

    auto: Any = (
        transformers.AutoModelForImageTextToText
        if family.reads_images
        else transformers.AutoModelForCausalLM
    )

    class Loader(auto):
        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> "PreTrainedModel":
            return family.load(dtype=dtype, device=device, **attention)

    return Loader

"""The engine that trains by Unsloth: its rewritten forward passes, its LoRA layers, its loss.

All else is the plain engine's: the family reads the weights, PEFT makes the adapter and its files,
and the `Trainer` is the same, so that both engines train the same numbers.
"""

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.engines.transformers import TransformersEngine, adapter_settings
from job.engines.unsloth_patches import quiet
from job.families.base import Family, LoraTargets
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class UnslothEngine(TransformersEngine):
    """Of a process into which `job.engines.unsloth_patches` has brought the library."""

    name: str = "unsloth"
    brings_forward: bool = True

    def load(self, family: Family, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        if dtype is not None:  # not to be trained: an export's proof reads it by another way
            return super().load(family, dtype)
        from unsloth import FastModel

        with tempfile.TemporaryDirectory() as place, quiet():
            # By these it finds the architecture, whose classes it rewrites before they are used.
            family.configuration().save_pretrained(place)
            family.processor.tokenizer.save_pretrained(place)
            model, _ = FastModel.from_pretrained(
                place,
                auto_model=_loader(family, self.dtype, self.device, self._attention()),
                dtype=self.dtype,
                device_map={"": self.device},
                load_in_4bit=False,
                load_in_16bit=True,
                use_gradient_checkpointing=False,  # the Trainer turns it on where the spec does
                offload_embedding=False,
                use_exact_model_name=True,  # else it may take a checkpoint of its own in its place
                local_files_only=True,
                **self._attention(),
            )
        return self.prepare(model.eval(), family)

    def attach_adapter(
        self, model: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec, seed: int
    ) -> "PeftModel":
        import torch
        from unsloth import FastModel

        # PEFT draws on the CPU: with the seed set just before, the plain engine's very adapter.
        with torch.random.fork_rng(devices=[]), quiet():
            adapted: PeftModel = FastModel.get_peft_model(
                model,
                **adapter_settings(targets, lora),
                target_parameters=list(targets.parameters),  # None would let it add experts
                use_gradient_checkpointing=False,
                random_state=seed,
            )
        config = adapted.peft_config[adapted.active_adapter]
        config.auto_mapping = None  # as in every adapter with a task type
        config.target_parameters = config.target_parameters or None
        return adapted

    def prepare(self, model: "PreTrainedModel", family: Family) -> "PreTrainedModel":
        if self.model.experts_implementation == "auto":  # it has put its own in
            return model.requires_grad_(False)
        return super().prepare(model, family)


def _loader(
    family: Family, dtype: "torch.dtype", device: "torch.device", attention: dict[str, Any]
) -> Any:
    """What Unsloth asks for the model once the classes are rewritten: the family's own reading.

    It knows the published layouts, and refuses files that do not hold the whole model.
    """
    import transformers

    auto: Any = (
        transformers.AutoModelForImageTextToText
        if family.reads_images
        else transformers.AutoModelForCausalLM
    )

    class Loader(auto):
        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            return family.load(dtype=dtype, device=device, **attention)

    return Loader

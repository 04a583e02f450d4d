"""The default engine: Transformers' own classes and PEFT."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import SpecError
from job.families.base import Family, LoraTargets
from job.families.lora.patterns import independent_of_order
from job.spec.types import LoraSpec, ModelSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TransformersEngine:
    model: ModelSpec
    dtype: "torch.dtype"
    autocast: bool
    device: "torch.device"
    name: str = "transformers"
    patches_forward: bool = False

    def load(self, family: Family, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        model = family.load(dtype=dtype or self.dtype, device=self.device, **self._attention())
        return self.prepare(model, family)

    def initialize(self, family: Family, seed: int) -> "PreTrainedModel":
        model = family.initialize(
            seed=seed, dtype=self.dtype, device=self.device, **self._attention()
        )
        return self.prepare(model, family)

    def attach_adapter(
        self, model: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec, seed: int
    ) -> "PeftModel":
        import torch
        from peft import LoraConfig, TaskType, get_peft_model

        from job.families.lora.linear import use_lora_linear
        from job.families.lora.saved_modules import saved_modules, use_saved_modules

        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            **adapter_settings(targets, lora),
            use_dora=lora.use_dora,
            target_parameters=list(targets.parameters) or None,
            modules_to_save=list(targets.saved_modules) or None,
            ensure_weight_tying=targets.ties_embeddings,
        )
        # Initialized on the CPU for every device, so that a seed gives the same adapter everywhere.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # About patterns, which PEFT compares with modules only, not with parameters.
            warnings.simplefilter("ignore", RuntimeWarning)
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        use_lora_linear(adapted)
        use_saved_modules(adapted)
        wrapped = len(targets.saved_modules) + targets.ties_embeddings
        assert len(saved_modules(adapted)) == wrapped, "PEFT matches other modules"
        return adapted

    def load_adapter(self, model: "PreTrainedModel", directory: Path) -> "PeftModel":
        from peft import PeftModel
        from safetensors.torch import load_file

        from job.families.lora.saved_modules import restore, saved_modules, use_saved_modules

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # as in `attach_adapter`
            adapted = PeftModel.from_pretrained(model, directory, is_trainable=False).eval()
        if saved_modules(adapted):
            use_saved_modules(adapted)
            restore(adapted, load_file(directory / "adapter_model.safetensors"))
        return adapted

    def _attention(self) -> dict[str, Any]:
        chosen = self.model.attn_implementation
        return {"attn_implementation": "sdpa" if chosen == "auto" else chosen}

    def prepare(self, model: "PreTrainedModel", family: Family) -> "PreTrainedModel":
        chosen: str = self.model.experts_implementation
        if chosen == "auto":
            # A grouped kernel pays off on a GPU; on a CPU a loop over the experts is as fast.
            chosen = "eager" if self.device.type == "cpu" else family.experts_on_gpu
        try:
            family.set_experts_implementation(model, chosen)
        except ValueError as error:
            # The model has no experts, which is an error only if the spec sets how they compute.
            if self.model.experts_implementation != "auto":
                raise SpecError(
                    "$.model.experts_implementation",
                    f"does not apply to this model: {error}",
                    value=chosen,
                    fix="remove the line; auto selects what the model has",
                ) from error
        return model.requires_grad_(False)


def adapter_settings(targets: LoraTargets, lora: LoraSpec) -> dict[str, Any]:
    """The adapter's settings that all engines share, by their names in PEFT."""
    names = (*targets.modules, *targets.parameters)
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "rank_pattern": independent_of_order(lora.rank_pattern, names),
        "alpha_pattern": independent_of_order(lora.alpha_pattern, names),
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "target_modules": list(targets.modules),
    }

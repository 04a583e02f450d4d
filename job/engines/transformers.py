"""The default engine: Transformers' own classes and PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.engines.lora_config import lora_config, without_pattern_warnings
from job.errors import SpecError
from job.families.base import Family
from job.families.four_bit import FourBit
from job.families.lora.target_groups import LoraTargets
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
    four_bit: FourBit | None = None
    name: str = "transformers"
    patches_forward: bool = False

    def load(self, family: Family, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        model = family.load(
            dtype=dtype or self.dtype,
            device=self.device,
            four_bit=self.four_bit if dtype is None else None,
            **self._attention(),
        )
        return self.prepare(model, family)

    def without_weights(self, family: Family) -> "PreTrainedModel":
        model = family.without_weights(dtype=self.dtype, device=self.device, **self._attention())
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
        from peft import get_peft_model

        from job.families.lora.gate_up import use_gate_up
        from job.families.lora.linear import use_lora_linear
        from job.families.lora.saved_modules import saved_modules, use_saved_modules

        config = lora_config(targets, lora)
        # Initialized on the CPU for every device, so that a seed gives the same adapter everywhere.
        with torch.random.fork_rng(devices=[]), without_pattern_warnings():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        use_lora_linear(adapted)
        use_gate_up(adapted, targets.gate_up)
        use_saved_modules(adapted)
        wrapped = len(targets.saved_modules) + targets.ties_embeddings
        assert len(saved_modules(adapted)) == wrapped, "PEFT matches other modules"
        return adapted

    def load_adapter(self, model: "PreTrainedModel", directory: Path) -> "PeftModel":
        from peft import PeftModel
        from safetensors.torch import load_file

        from job.families.lora.saved_modules import restore, saved_modules, use_saved_modules

        with without_pattern_warnings():
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
            # A grouped kernel pays off on a GPU; on a CPU a loop over experts is as fast, unless
            # it would unpack weights anew for each expert.
            loops = self.device.type == "cpu" and self.four_bit is None
            chosen = "eager" if loops else family.experts_on_gpu
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
        if self.four_bit is not None:
            from job.families.four_bit.experts import use_packed_experts

            use_packed_experts(model)
        return model.requires_grad_(False)

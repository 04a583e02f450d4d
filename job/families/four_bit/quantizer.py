"""Packs weights while Transformers reads a checkpoint.

A quantization method of this project's own, registered with Transformers: its loader then reads
one tensor after another, renames and fuses it, and hands it over to be packed. So no more than one
weight, and the tensors that it is fused from, is ever in memory unpacked.
"""

from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from job.families.four_bit import FourBit
from job.families.four_bit.packed_weights import packed_names
from job.families.four_bit.tensor import FourBitTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "finetune_job_4bit"


def quantization_arguments(four_bit: FourBit | None) -> dict[str, QuantizationConfigMixin]:
    """The arguments with which `from_pretrained` packs weights; none without `four_bit`."""
    return {} if four_bit is None else {"quantization_config": _Config(four_bit)}


def as_loaded_plainly(model: "PreTrainedModel") -> None:
    """Removes what Transformers adds to a quantized model: it is trained and saved as any other."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    quantizer.remove_quantization_config(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_is_quantized", False):
            del config._is_quantized


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):
    def __init__(self, four_bit: FourBit) -> None:
        super().__init__(quant_method=METHOD)
        self.four_bit = four_bit

    def to_dict(self) -> dict[str, object]:
        return {"quant_method": self.quant_method}


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    quantization_config: _Config

    def __init__(self, quantization_config: _Config, **_: object) -> None:
        super().__init__(quantization_config, pre_quantized=False)
        self._names: set[str] = set()

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", **_: object
    ) -> "PreTrainedModel":
        self._names = {*packed_names(model, self.quantization_config.four_bit)}
        return model

    def param_needs_quantization(
        self, model: "PreTrainedModel", param_name: str, **_: object
    ) -> bool:
        return param_name in self._names

    def param_element_size(
        self, model: "PreTrainedModel", param_name: str, param: torch.Tensor
    ) -> float:
        # Transformers reserves the sum at the start.
        packed = param_name in self._names
        return 0.5 if packed else super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self.quantization_config.four_bit)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Pack(ConversionOps):
    def __init__(self, four_bit: FourBit) -> None:
        self._four_bit = four_bit

    def convert(
        self, input_dict: dict[str, torch.Tensor | list[torch.Tensor]], **_: object
    ) -> dict[str, torch.nn.Parameter]:
        """Packs one weight, or several that are stored as one."""
        packed = {}
        while input_dict:
            name, value = input_dict.popitem()
            tensor = value.pop() if isinstance(value, list) else value
            del value  # each is freed before the next is packed
            packed[name] = torch.nn.Parameter(
                FourBitTensor.of(tensor, self._four_bit), requires_grad=False
            )
        return packed

"""The flat configuration of ERNIE-4.5-VL; every field of config.json becomes an attribute."""

from typing import Any

from transformers import PretrainedConfig


class Ernie45VLVisionConfig(PretrainedConfig):
    model_type = "DFNRope_vision_transformer"


class Ernie45VLConfig(PretrainedConfig):
    model_type = "ernie4_5_moe_vl"
    sub_configs = {"vision_config": Ernie45VLVisionConfig}  # noqa: RUF012 - as Transformers has it
    ignore_keys_at_rope_validation = {"mrope_section"}  # noqa: RUF012

    def __init__(
        self,
        vision_config: "Ernie45VLVisionConfig | dict[str, Any] | None" = None,
        **fields: object,
    ) -> None:
        if not isinstance(vision_config, Ernie45VLVisionConfig):
            vision_config = Ernie45VLVisionConfig(**(vision_config or {}))
        self.vision_config = vision_config
        super().__init__(**fields)

"""Converts `config.json` between the flat, published format and Transformers' nested one.

Fields are mapped as in the published configuration code and in Transformers' converter
(https://github.com/huggingface/transformers, `convert_ernie4_5_vl_moe_to_hf.py`).
"""

from typing import Any

MODEL_TYPE = "ernie4_5_moe_vl"
ARCHITECTURE = "Ernie4_5_VLMoeForConditionalGeneration"
NATIVE_MODEL_TYPE = "ernie4_5_vl_moe"

MROPE_SECTION = [22, 22, 20]
"""The value of the published checkpoints, and Transformers' default."""

# Same name and meaning in `text_config` and in the flat config.
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "use_bias", "initializer_range", "use_cache", "router_aux_loss_coef"),
    *("moe_intermediate_size", "moe_k", "moe_num_shared_experts", "moe_norm_min"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_TOKENS = (
    *("image_start_token_id", "image_end_token_id"),
    *("video_start_token_id", "video_end_token_id", "video_token_id"),
)
_VISION = (
    *("depth", "hidden_size", "hidden_act", "num_heads", "in_channels"),
    *("patch_size", "spatial_merge_size", "initializer_range"),
)


def to_flat(config: dict[str, Any]) -> dict[str, Any]:
    """Flattens a nested config; the caller adds `dtype` and `auto_map`."""
    text, vision = config["text_config"], config["vision_config"]
    rope = text["rope_parameters"]
    section = list(rope.get("mrope_section", MROPE_SECTION))
    sparse = [i for i, kind in enumerate(text["mlp_layer_types"]) if kind == "sparse"]
    interval = _interval(sparse, len(text["mlp_layer_types"]))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{key: text[key] for key in _TEXT if text.get(key) is not None},
        **{key: config[key] for key in _TOKENS if key in config},
        "im_patch_id": config["image_token_id"],
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "rope_3d": True,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "default", "mrope_section": section},
        "freq_allocation": section[-1],
        "use_moe": True,
        "moe_gate": "topk",
        "moe_use_aux_free": True,
        "moe_num_experts": [text["moe_num_experts"]] * 2,
        "moe_layer_start_index": [sparse[0]] * 2,
        "moe_layer_end_index": [sparse[-1]] * 2,
        "moe_layer_interval": interval,
        "pixel_hidden_size": vision["hidden_size"],
        "spatial_conv_size": vision["spatial_merge_size"],
        "temporal_conv_size": vision["temporal_merge_size"],
        "use_temporal_conv": True,
        "vision_config": {
            "model_type": "DFNRope_vision_transformer",
            **{key: vision[key] for key in _VISION if key in vision},
            "embed_dim": vision["hidden_size"],
            "mlp_ratio": _ratio(vision["intermediate_size"], vision["hidden_size"]),
        },
    }


def to_nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Nests a flat config.

    Raises KeyError or ValueError for a field that is missing, or that Transformers' classes
    cannot express.
    """
    vision = flat["vision_config"]
    layers = flat["num_hidden_layers"]
    experts = flat["moe_num_experts"]
    if len(set(experts)) != 1:
        raise ValueError(f"moe_num_experts must be two equal numbers, not {experts}")
    first = min(flat["moe_layer_start_index"])
    last = max(flat.get("moe_layer_end_index", [layers - 1]))
    interval = flat.get("moe_layer_interval", 1)
    section = (flat.get("rope_scaling") or {}).get("mrope_section", MROPE_SECTION)
    dtype = flat.get("dtype", flat.get("torch_dtype"))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": NATIVE_MODEL_TYPE,
        **({"dtype": dtype} if dtype else {}),
        **{key: flat[key] for key in _TOKENS if key in flat},
        "image_token_id": flat["im_patch_id"],
        "tie_word_embeddings": flat.get("tie_word_embeddings", True),
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text",
            **{key: flat[key] for key in _TEXT if flat.get(key) is not None},
            "moe_num_shared_experts": flat.get("moe_num_shared_experts") or 0,
            "use_cache": True,  # false in published checkpoints, a leftover of training
            "tie_word_embeddings": flat.get("tie_word_embeddings", True),
            "moe_num_experts": experts[0],
            "mlp_layer_types": [
                "sparse" if first <= layer <= last and (layer + 1) % interval == 0 else "dense"
                for layer in range(layers)
            ],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": float(flat.get("rope_theta", 500_000.0)),
                "mrope_section": list(section),
            },
        },
        "vision_config": {
            "model_type": "ernie4_5_vl_moe_vision",
            **{key: vision[key] for key in _VISION if key in vision},
            "intermediate_size": int(vision["hidden_size"] * vision["mlp_ratio"]),
            "spatial_merge_size": flat["spatial_conv_size"],
            "temporal_merge_size": flat["temporal_conv_size"],
            "rms_norm_eps": 1e-6,
        },
    }


def _interval(sparse: list[int], layers: int) -> int:
    """The `moe_layer_interval` that gives these sparse layers."""
    for interval in range(1, layers + 1):
        span = range(sparse[0], sparse[-1] + 1)
        if sparse == [layer for layer in span if (layer + 1) % interval == 0]:
            return interval
    raise ValueError(f"the flat config cannot express these sparse layers: {sparse}")


def _ratio(intermediate: int, hidden: int) -> int | float:
    return intermediate // hidden if intermediate % hidden == 0 else intermediate / hidden

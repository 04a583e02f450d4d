"""Checkpoints in Transformers' own file layout: configuration, weights, and tensor names."""

import copy
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log
from job.errors import InputError, SpecError
from job.families import weight_files
from job.families.four_bit import FourBit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass as AutoClass

_WRAPPER = re.compile(r"\.base_layer\b")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_CONVERSION = "automatic conversion of the weights"
"""What Transformers' error says if it could not stack a layer's experts, for example."""
_COPY = "check that the checkpoint was copied whole and belongs to its config.json"


def configuration(auto: "type[AutoClass]", uri: str, config: dict[str, Any]) -> "PreTrainedConfig":
    """The configuration object for a `config.json`.

    Raises SpecError if the `Auto` class has no such model, and InputError if the weights are
    quantized, which cannot be merged.
    """
    from transformers import CONFIG_MAPPING

    if "quantization_config" in config:
        raise InputError(
            uri, "holds quantized weights", fix="use the checkpoint that they were quantized from"
        )
    model_type = config.get("model_type")
    try:
        config_class = CONFIG_MAPPING[model_type]
    except KeyError:
        config_class = None
    if config_class is None or config_class not in auto._model_mapping:
        raise SpecError(
            "$.model.model_name_or_path",
            f"its model_type {model_type!r} belongs to no known family: Transformers' "
            f"{auto.__name__} has no such model",
            value=uri,
        )
    return config_class.from_dict(copy.deepcopy(config))


def attention_arguments(attn_implementation: str | None) -> dict[str, str]:
    """Arguments that select the attention implementation; none if Transformers is to choose."""
    return {} if attn_implementation is None else {"attn_implementation": attn_implementation}


def load(
    auto: "type[AutoClass]",
    uri: str,
    directory: Path,
    *,
    dtype: "torch.dtype",
    device: "torch.device",
    attn_implementation: str | None,
    four_bit: FourBit | None = None,
) -> "PreTrainedModel":
    """The checkpoint's model, in evaluation mode.

    Raises InputError if files or tensors are missing, or tensors have the wrong shape.
    """
    from job.families.four_bit.quantizer import as_loaded_plainly, quantization_arguments

    stored = weight_files.shapes(uri, directory)  # raises if a file is missing or truncated
    try:
        model, loading = auto.from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **attention_arguments(attn_implementation),
            **quantization_arguments(four_bit),
        )
    except ValueError as error:  # for example, an unsupported attention implementation
        raise InputError(uri, f"Transformers cannot load it: {error}") from error
    except RuntimeError as error:
        if _CONVERSION not in str(error):
            raise
        report_differences(uri, misshapen=_unlike_other_experts(stored))
        raise InputError(
            uri, "Transformers cannot convert its tensors to those of its config.json", fix=_COPY
        ) from error
    as_loaded_plainly(model)
    misshapen = [name for name, *_ in loading["mismatched_keys"]]
    if four_bit is not None:  # Transformers does not compare shapes if weights are quantized
        misshapen += _misshapen(auto, model)
    report_differences(
        uri,
        missing=loading["missing_keys"],
        misshapen=misshapen,
        unexpected=loading["unexpected_keys"],
    )
    return model.eval()


def ignored_when_loaded(model: "PreTrainedModel") -> Callable[[str], bool]:
    """Which tensors of a checkpoint Transformers ignores, though the model does not have them."""
    patterns = {*(model._keys_to_ignore_on_load_unexpected or ())}
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def report_differences(
    uri: str,
    *,
    missing: Collection[str] = (),
    misshapen: Collection[str] = (),
    unexpected: Collection[str] = (),
) -> None:
    """Raises InputError if tensors of the model are missing or misshapen; warns of unknown ones."""
    for names, what in ((missing, "are missing"), (misshapen, "are misshapen")):
        if names:
            raise InputError(
                uri,
                f"{len(names)} tensors of its config.json {what}: "
                f"{weight_files.shortened(sorted(names))}",
                fix=_COPY,
            )
    if unexpected:
        log.warn(
            "the checkpoint has tensors unknown to its architecture: merged/ will lack them",
            count=len(unexpected),
            names=weight_files.shortened(sorted(unexpected)),
        )


def _unlike_other_experts(stored: weight_files.Shapes) -> list[str]:
    """The tensors of experts that have another shape than those of most in their layer."""
    shapes: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    layers = {name: _EXPERT.sub(".experts.", name) for name in stored if _EXPERT.search(name)}
    for name, layer in layers.items():
        shapes[layer][stored[name]] += 1
    usual = {layer: counted.most_common(1)[0][0] for layer, counted in shapes.items()}
    return [name for name, layer in layers.items() if stored[name] != usual[layer]]


def _misshapen(auto: "type[AutoClass]", model: "PreTrainedModel") -> list[str]:
    import torch

    with torch.device("meta"):
        meta = auto.from_config(model.config, trust_remote_code=False)
    expected = {name: parameter.shape for name, parameter in meta.named_parameters()}
    return [n for n, p in model.named_parameters() if n in expected and p.shape != expected[n]]


def write_config(config: dict[str, Any], directory: Path, dtype: "torch.dtype") -> None:
    """Writes the checkpoint's `config.json` with the dtype of the weights."""
    name = str(dtype).removeprefix("torch.")
    written = _with_dtype(config, name)
    for section in ("text_config", "vision_config"):
        if isinstance(written.get(section), dict):
            written[section] = _with_dtype(written[section], name)
    write_json(written, directory / "config.json")


def write_json(config: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def stored(
    model: "PreTrainedModel", tensors: "Iterable[tuple[str, torch.Tensor]]"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors under their names in checkpoints, and the buffers that checkpoints contain.

    Converted one by one, to avoid a second copy of the model in memory; all at once only if the
    checkpoint fuses several of them into one tensor.
    """
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    conversions = getattr(model, "_weight_conversions", None) or ()
    fused = any(isinstance(c, WeightConverter) and len(c.target_patterns) > 1 for c in conversions)
    named = itertools.chain(tensors, _buffers(model))
    single = (dict([pair]) for pair in named)
    # All at once on the host: a GPU that holds the model may have no room for a second one.
    groups: Iterable[dict[str, torch.Tensor]] = (
        [{name: _on_host(tensor) for name, tensor in named}] if fused else single
    )
    for group in groups:
        for name, value in revert_weight_conversion(model, group).items():
            yield name, value.contiguous()


def _on_host(tensor: "torch.Tensor") -> "torch.Tensor":
    return tensor if tensor.is_meta else tensor.cpu()


def _with_dtype(section: dict[str, Any], name: str) -> dict[str, Any]:
    """The section with this `dtype`, which older configurations call `torch_dtype`."""
    return {**{k: v for k, v in section.items() if k != "torch_dtype"}, "dtype": name}


def _buffers(model: "PreTrainedModel") -> "Iterator[tuple[str, torch.Tensor]]":
    """Persistent buffers, such as a router's correction bias."""
    stored_names = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored_names:
            yield _WRAPPER.sub("", name), buffer.detach().cpu()

"""Converts the names and shapes of Transformers' weights to the published ones.

The inverse of Transformers' conversion mapping for `ernie4_5_vl_moe`, tensor by tensor, so that
writing a model needs no second copy of it in memory. A test compares the two.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from job.families import weight_files
from job.families.weight_files import NamedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RENAMED = (
    (re.compile(r"^model\.vision_tower\."), "vision_model."),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"(spatial|temporal)_linear\.fc1\."), r"\1_linear.0."),
    (re.compile(r"(spatial|temporal)_linear\.fc2\."), r"\1_linear.2."),
    (re.compile(r"(spatial|temporal)_linear\.ln\."), r"\1_linear.3."),
)
_ROUTED = re.compile(r"^model\.language_model\.(layers\.\d+\.mlp)\.(text|vision)_moe\.(.+)$")


def published(tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """The tensors with their published names and shapes, contiguous, a few at a time.

    Routed experts are split, text experts first; gates are transposed; a layer's two correction
    biases become one tensor.
    """
    biases: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        routed = _ROUTED.match(name)
        if routed is None:
            yield rename(name), tensor.contiguous()
            continue
        mlp, modality, part = f"model.{routed[1]}", routed[2], routed[3]
        if part == "gate.weight":  # (E, hidden)
            suffix = "_1" if modality == "vision" else ""
            yield f"{mlp}.gate.weight{suffix}", tensor.T.contiguous()
        elif part == "gate.moe_statics.e_score_correction_bias":  # (1, E)
            pair = biases.setdefault(mlp, {})
            pair[modality] = tensor
            if len(pair) == 2:
                both = torch.cat([pair["text"], pair["vision"]])  # (2, E)
                yield f"{mlp}.moe_statics.e_score_correction_bias", both
                del biases[mlp]
        else:
            yield from _experts(mlp, modality, part, tensor)
    assert not biases, f"layers with one correction bias: {sorted(biases)}"


def require_complete(uri: str, directory: Path, meta_model: "PreTrainedModel") -> None:
    """Raises InputError if the stored tensors are not the model's, by name and shape.

    Three naming schemes are accepted: the published one; that of Transformers' `save_pretrained`,
    which puts the vision tower under `model.`; and the parameter names of Transformers' classes.
    """
    stored = weight_files.shapes(uri, directory)
    parameters: list[NamedTensor] = list(meta_model.named_parameters())
    if not any(name.startswith("model.language_model.") for name in stored):
        parameters = list(published(parameters))
        if any(name.startswith("model.vision_model.") for name in stored):
            parameters = [
                (f"model.{name}" if name.startswith("vision_model.") else name, parameter)
                for name, parameter in parameters
            ]
    expected = {name: tuple(parameter.shape) for name, parameter in parameters}
    head = "lm_head.weight"
    if head not in expected and stored.get(head) == tuple(meta_model.lm_head.weight.shape):
        del stored[head]  # tied: the embeddings, stored twice
    weight_files.require(uri, stored, expected)


def rename(name: str) -> str:
    """The published name of a tensor that is stored unchanged."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _experts(mlp: str, modality: str, part: str, tensor: torch.Tensor) -> Iterator[NamedTensor]:
    """Splits (E, out, in) into experts, by number; vision experts follow the text experts."""
    first = tensor.shape[0] if modality == "vision" else 0
    for number, expert in enumerate(tensor, start=first):
        if part == "experts.down_proj":  # (hidden, intermediate)
            yield f"{mlp}.experts.{number}.down_proj.weight", expert.contiguous()
        else:
            assert part == "experts.gate_up_proj", part
            gate, up = expert.chunk(2)  # each (intermediate, hidden)
            yield f"{mlp}.experts.{number}.gate_proj.weight", gate.contiguous()
            yield f"{mlp}.experts.{number}.up_proj.weight", up.contiguous()

"""The published names and shapes of the weights, out of those of Transformers' classes.

The inverse of Transformers' conversion mapping for `ernie4_5_vl_moe`, tensor by tensor, so that a
model can be written without a second copy of it in memory. A test holds both equal.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from job.families import weight_files

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

Named = tuple[str, torch.Tensor]


def published(tensors: Iterable[Named]) -> Iterator[Named]:
    """The tensors under their published names, contiguous, a few at a time.

    Routed experts are split, text experts first; gates are transposed; the two correction biases
    of a layer become one.
    """
    biases: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        routed = _ROUTED.match(name)
        if routed is None:
            yield rename(name), tensor.contiguous()
            continue
        mlp, kind, part = f"model.{routed[1]}", routed[2], routed[3]
        if part == "gate.weight":  # (E, hidden)
            suffix = "_1" if kind == "vision" else ""
            yield f"{mlp}.gate.weight{suffix}", tensor.T.contiguous()
        elif part == "gate.moe_statics.e_score_correction_bias":  # (1, E)
            pair = biases.setdefault(mlp, {})
            pair[kind] = tensor
            if len(pair) == 2:
                both = torch.cat([pair["text"], pair["vision"]])  # (2, E)
                yield f"{mlp}.moe_statics.e_score_correction_bias", both
                del biases[mlp]
        else:
            yield from _experts(mlp, kind, part, tensor)
    assert not biases, f"layers with one correction bias: {sorted(biases)}"


def require_complete(uri: str, directory: Path, skeleton: "PreTrainedModel") -> None:
    """Raises InputError where the stored tensors are not those of the model, by name and shape.

    Three spellings are read: the published one; Transformers' `save_pretrained`, which puts the
    vision tower under `model.`; and the names of Transformers' classes themselves.
    """
    found = weight_files.shapes(uri, directory)
    own: list[Named] = list(skeleton.named_parameters())
    if not any(name.startswith("model.language_model.") for name in found):
        own = list(published(own))
        if any(name.startswith("model.vision_model.") for name in found):
            own = [
                (f"model.{name}" if name.startswith("vision_model.") else name, parameter)
                for name, parameter in own
            ]
    wanted = {name: tuple(parameter.shape) for name, parameter in own}
    head = "lm_head.weight"
    if head not in wanted and found.get(head) == tuple(skeleton.lm_head.weight.shape):
        del found[head]  # tied: the embeddings, stored twice
    weight_files.require(uri, found, wanted)


def rename(name: str) -> str:
    """The published name of a tensor that is stored as it is."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _experts(mlp: str, kind: str, part: str, tensor: torch.Tensor) -> Iterator[Named]:
    first = tensor.shape[0] if kind == "vision" else 0
    for number, expert in enumerate(tensor, start=first):
        if part == "experts.down_proj":  # (hidden, intermediate)
            yield f"{mlp}.experts.{number}.down_proj.weight", expert.contiguous()
        else:
            assert part == "experts.gate_up_proj", part
            gate, up = expert.chunk(2)  # each (intermediate, hidden)
            yield f"{mlp}.experts.{number}.gate_proj.weight", gate.contiguous()
            yield f"{mlp}.experts.{number}.up_proj.weight", up.contiguous()

"""The parts of a selection that all families share: layers, and modules trained in full."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from job.errors import SpecError
from job.families.lora.patterns import require_matches
from job.families.lora.target_groups import LoraTargets, TargetGroup
from job.spec.foreign_names import nearest
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SAVED = "$.lora.modules_to_save"
_LAYERS = "$.lora.layers_to_transform"
_LAYER = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")
"""The first numbered part of a name, as PEFT finds it: not the number of an expert."""
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")


def selected(
    model: "PreTrainedModel", groups: Sequence[TargetGroup], lora: LoraSpec
) -> LoraTargets:
    """The groups as targets: those in `layers_to_transform`, without modules trained in full.

    Raises SpecError if nothing is left, or if `layers_to_transform`, `modules_to_save` or a pattern
    names what the model or the selection does not have.
    """
    layers = _layers(lora)
    if layers is not None:
        _require_layers(layers, groups)
        groups = [_filtered(group, lambda name: _layer_of(name) in layers) for group in groups]
    saved, tied = _saved_modules(model, lora.modules_to_save or ())
    # As in PEFT, what is trained in full gets no adapter.
    groups = [_filtered(group, lambda name: not _inside(name, saved)) for group in groups]
    groups = [group for group in groups if len(group)]
    if not groups:
        raise SpecError(
            "$.lora",
            "selects no module of the model"
            + (" that modules_to_save does not train in full" if saved else ""),
            fix="turn on a finetune_ toggle",
        )
    targets = LoraTargets(groups=tuple(groups), saved_modules=saved, ties_embeddings=tied)
    require_matches(lora, (*targets.modules, *targets.parameters))
    return targets


def trained_in_full(
    model: "torch.nn.Module", targets: LoraTargets
) -> "dict[str, torch.nn.Parameter]":
    """The parameters of the saved modules, by full name; tied ones once."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if _inside(name, targets.saved_modules)
    }


def _layers(lora: LoraSpec) -> tuple[int, ...] | None:
    chosen = lora.layers_to_transform
    return (chosen,) if isinstance(chosen, int) else chosen


def _require_layers(layers: Sequence[int], groups: Sequence[TargetGroup]) -> None:
    """Raises SpecError for a number that no adapted layer has."""
    names = [name for group in groups for name in (*group.modules, *group.parameters)]
    known = {number for name in names if (number := _layer_of(name)) is not None}
    if missing := sorted({*layers} - known):
        raise SpecError(
            _LAYERS,
            "the selected modules have no layer of this number",
            value=missing[0],
            fix=f"layers with selected modules: {min(known)} to {max(known)}"
            if known
            else "remove the line: the selected modules are in no layers",
        )


def _layer_of(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match["number"]) if match else None


def _filtered(group: TargetGroup, keep: Callable[[str], bool]) -> TargetGroup:
    return TargetGroup(
        name=group.name,
        modules=tuple(name for name in group.modules if keep(name)),
        parameters=tuple(name for name in group.parameters if keep(name)),
        gate_up=tuple(name for name in group.gate_up if keep(name)),
    )


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _saved_modules(model: "PreTrainedModel", wanted: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The full names of the modules to train in full, and whether the output layer is tied to one.

    A tied output layer is not listed: the embeddings are, of which it is a part. Raises SpecError
    for a name that matches no module, or one that cannot be trained in full.
    """
    if not wanted:
        return (), False
    named = {
        name: module
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters())
    }
    chosen: dict[str, str] = {}  # by full name, the entry of the spec
    for entry in wanted:
        matches = [name for name in named if name == entry or name.endswith(f".{entry}")]
        if not matches:
            raise _unknown(entry, named)
        for name in matches:
            _require_savable(entry, name, named[name])
            chosen.setdefault(name, entry)
    for name, entry in chosen.items():
        if outer := next((other for other in chosen if name.startswith(f"{other}.")), None):
            raise SpecError(
                _SAVED,
                f"names {name}, which is inside {outer} and trained with it",
                value=entry,
                fix=f"remove {entry}",
            )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = [name for name in named if named[name] in (embeddings, head)]
    if head is None or head.weight is not embeddings.weight or not chosen.keys() & {*tied}:
        return tuple(chosen), False
    first = next(name for name in tied if named[name] is embeddings)
    return (first, *(name for name in chosen if name not in tied)), True


def _unknown(entry: str, named: "Mapping[str, torch.nn.Module]") -> SpecError:
    endings = sorted({name.rpartition(".")[2] for name in named} - {*map(str, range(1000))})
    close = nearest(entry.rpartition(".")[2], endings)
    return SpecError(
        _SAVED,
        "names no module of the model",
        value=entry,
        fix=f"write {close}" if close else f"known names: {', '.join(endings)}",
    )


def _require_savable(entry: str, name: str, module: "torch.nn.Module") -> None:
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    parts = list(module.named_modules(prefix=name))
    problem = None
    if any(isinstance(part, GradientCheckpointingLayer) for _, part in parts):
        problem = "which is or holds whole layers"
    elif any(
        parameter.ndim >= 3 and not isinstance(part, nn.modules.conv._ConvNd)
        for _, part in parts
        for parameter in part.parameters(recurse=False)
    ):
        problem = "which holds fused experts"
    elif any(_ROUTER.search(part_name) for part_name, _ in parts):
        problem = "which is or holds a router"
    if problem is not None:
        raise SpecError(
            _SAVED,
            f"names {name}, {problem}",
            value=entry,
            fix="name embeddings, the output layer, norms or a connector; lora.method: full trains "
            "every weight",
        )

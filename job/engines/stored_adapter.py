"""An adapter in PEFT's format, ours or made elsewhere: what it adapts, judged by its tensors.

`read_adapter` compares the header of its file with the model's architecture, so no weights of the
model are needed. `load_into` copies its values into an adapter of the same shape.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.engines.adapter_config import AdapterConfig
from job.engines.adapter_description import Names, describe
from job.engines.base import Engine
from job.engines.gate_up_adapter import stored_gate_up
from job.engines.lora_config import lora_config, without_pattern_warnings
from job.errors import InputError
from job.families import weight_files
from job.families.adapter_files import WEIGHTS
from job.families.lora import adapter_names
from job.families.lora.adapter_names import BASE_LAYER, PREFIX, StoredName
from job.families.lora.target_groups import LoraTargets
from job.families.weight_files import Differences, Shapes, shortened
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """A stored adapter that fits the model."""

    uri: str
    directory: Path
    config: AdapterConfig
    lora: LoraSpec
    """What a spec's `lora` would say to describe it, with full names."""
    targets: LoraTargets
    renamed: Mapping[str, str]
    """PEFT's name in this model, by the name of each stored tensor."""
    naming: str
    """How its tensors are named: a key of `adapter_names.RENAMINGS`."""


def read_adapter(uri: str, directory: Path, skeleton: "PreTrainedModel") -> StoredAdapter:
    """Reads an adapter's configuration and header.

    `skeleton` is the architecture on the meta device. Raises one InputError for all tensors that do
    not fit it, and for an adapter of a kind that is not supported.
    """
    config = AdapterConfig.read(uri, directory)
    shapes = weight_files.file_shapes(uri, directory / WEIGHTS)
    stored = _parsed(uri, shapes)
    modules = {name for name, _ in skeleton.named_modules()}
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    found = adapter_names.renaming(set(stored.values()), modules, parameters)
    if found is None:
        raise _not_of_this_model(uri, config, stored, modules, parameters)
    naming, rename = found
    gate_up = stored_gate_up(config, directory / WEIGHTS, stored, rename, parameters)
    lora, targets = describe(config, shapes, stored, rename, skeleton, gate_up)
    expected = _expected_shapes(skeleton, targets, lora)
    renamed = _renamed(stored, rename, expected)
    _require_distinct(uri, renamed)
    _require_shapes(uri, config, {renamed[name]: shape for name, shape in shapes.items()}, expected)
    return StoredAdapter(
        uri=uri,
        directory=directory,
        config=config,
        lora=lora,
        targets=targets,
        renamed=renamed,
        naming=naming,
    )


def with_adapter(engine: Engine, model: "PreTrainedModel", stored: StoredAdapter) -> "PeftModel":
    """The model with the adapter, in evaluation mode."""
    adapted = engine.attach_adapter(model, stored.targets, stored.lora, seed=0)
    load_into(adapted, stored)
    return adapted.requires_grad_(False).eval()


def load_into(adapted: "PeftModel", stored: StoredAdapter) -> None:
    """Copies the stored values into the adapter, which has the stored one's shape.

    Raises InputError for values that are not finite, and for two copies of one tied matrix that
    differ.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(stored.directory / WEIGHTS)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(stored.uri, f"{name} has values that are not finite", fix=_COPY)
    named = {stored.renamed[name]: tensor for name, tensor in tensors.items()}
    if stored.targets.ties_embeddings:
        _require_tied(stored, named)
    result = set_peft_model_state_dict(adapted, named)
    assert not result.unexpected_keys, f"not in the adapter: {result.unexpected_keys[:3]}"


_COPY = "copy the adapter again, or train it again at a lower learning rate"


def _parsed(uri: str, shapes: Shapes) -> dict[str, StoredName]:
    parsed = {name: adapter_names.parse(name) for name in shapes}
    if others := [name for name, each in parsed.items() if each is None]:
        raise InputError(
            uri,
            f"has tensors of a kind that this version does not train: {shortened(others)}",
            fix="merge it with the tool that made it, and use the merged model",
        )
    if not any(each is not None and each.part for each in parsed.values()):
        raise InputError(uri, "has no LoRA tensors", fix="copy the adapter whole")
    return {name: each for name, each in parsed.items() if each is not None}


def _not_of_this_model(
    uri: str,
    config: AdapterConfig,
    stored: Names,
    modules: "set[str]",
    parameters: "Mapping[str, torch.nn.Parameter]",
) -> InputError:
    names = set(stored.values())
    absent = min(
        (
            adapter_names.missing(names, adapter_names.function(pairs), modules, parameters)
            for pairs in adapter_names.RENAMINGS.values()
        ),
        key=len,
    )
    single_experts = any(".experts." in name for name in absent)
    made_for = f"; it was made for {config.base}" if config.base else ""
    return InputError(
        uri,
        f"adapts {len(absent)} modules that the model does not have: {shortened(absent)}{made_for}",
        fix="it adapts single experts, which this model computes together: train it again, with "
        "lora.finetune_experts: true"
        if single_experts
        else "use an adapter of this model, or the model of this adapter",
    )


def _expected_shapes(skeleton: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec) -> Shapes:
    from peft import get_peft_model, get_peft_model_state_dict

    with without_pattern_warnings():
        adapted = get_peft_model(copy.deepcopy(skeleton), lora_config(targets, lora))
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _renamed(stored: Names, rename: Callable[[str], str], expected: Shapes) -> dict[str, str]:
    """The name that PEFT gives each stored tensor in this model."""
    plain = {name.removeprefix(PREFIX).replace(BASE_LAYER, ""): name for name in expected}

    def name_of(each: StoredName) -> str:
        path = each.module.replace(BASE_LAYER, "")
        if each.part is None:
            return plain.get(rename(path), f"{PREFIX}{rename(path)}")
        nested = BASE_LAYER * each.module.count(BASE_LAYER)
        ending = "" if each.part == "lora_magnitude_vector" else ".weight"
        return f"{PREFIX}{rename(path)}{nested}.{each.part}{ending}"

    return {name: name_of(each) for name, each in stored.items()}


def _require_distinct(uri: str, renamed: Mapping[str, str]) -> None:
    twice = [name for name, count in Counter(renamed.values()).items() if count > 1]
    if twice:
        raise InputError(
            uri,
            f"has {len(twice)} tensors under several names: {shortened(twice)}",
            fix="save it again with PEFT, with one adapter",
        )


def _require_shapes(uri: str, config: AdapterConfig, stored: Shapes, expected: Shapes) -> None:
    found = Differences.between(stored, expected, PREFIX)
    problems = found.problems(
        unknown="are unexpected", misshapen="have another shape than this model needs"
    )
    if not problems:
        return
    made_for = f"; it was made for {config.base}" if config.base else ""
    raise InputError(
        uri,
        f"its tensors do not fit the model: {'; '.join(problems)}{made_for}",
        fix="use an adapter of this model, or the model of this adapter"
        if found.misshapen
        else "copy the adapter whole",
    )


def _require_tied(stored: StoredAdapter, named: "Mapping[str, torch.Tensor]") -> None:
    """Raises InputError if embeddings and output layer were trained apart."""
    import torch

    [embeddings] = [f"{PREFIX}{name}.weight" for name in stored.targets.saved_modules[:1]]
    others = [
        name
        for name, tensor in named.items()
        if name != embeddings
        and tensor.shape == named[embeddings].shape
        and name.endswith("lm_head.weight")
    ]
    for other in others:
        if not torch.equal(named[embeddings], named[other]):
            raise InputError(
                stored.uri,
                "its embeddings and output layer were trained apart, but the model has one matrix "
                "for both",
                fix="train it again with PEFT's ensure_weight_tying",
            )

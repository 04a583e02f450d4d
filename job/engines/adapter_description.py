"""Describes a stored adapter as a spec's `lora` would, from its tensors and its configuration."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from job.engines.adapter_config import AdapterConfig
from job.engines.lora_config import ADAPTERS
from job.families.lora.adapter_names import BASE_LAYER, StoredName
from job.families.lora.patterns import exact
from job.families.lora.target_groups import LoraTargets, TargetGroup
from job.families.weight_files import Shapes
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Names = Mapping[str, StoredName]
"""The parts of each stored tensor's name, by that name."""


def describe(
    config: AdapterConfig,
    shapes: Shapes,
    stored: Names,
    rename: Callable[[str], str],
    skeleton: "PreTrainedModel",
    gate_up: Collection[str],
) -> tuple[LoraSpec, LoraTargets]:
    """What the adapter adapts, and with which settings, by the model's names.

    `gate_up` are the parameters for which it stores an adapter each of gate and up, as one.
    """
    original = {
        rename(plain): plain
        for each in stored.values()
        if each.part is not None and (plain := each.module.replace(BASE_LAYER, ""))
    }
    parameters = _adapted_parameters(config, rename, skeleton, original)
    owners = {name.rpartition(".")[0] for name in parameters}
    modules = tuple(name for name in original if name not in owners)
    ranks = {
        rename(each.module): shapes[name][0]
        for name, each in stored.items()
        if each.part == "lora_A" and rename(each.module) in modules
    }
    alphas = {name: config.alpha_of(original[name]) for name in modules}
    for name in parameters:  # of several parameters of one module, the tensors do not tell which
        owner, _, leaf = name.rpartition(".")
        each = ADAPTERS if name in gate_up else 1
        ranks[name] = config.rank_of(f"{original[owner]}.{leaf}") // each
        alphas[name] = config.alpha_of(f"{original[owner]}.{leaf}", each)
    saved, tied = _saved(config, stored, rename, skeleton)
    use_dora = any(each.part == "lora_magnitude_vector" for each in stored.values())
    group = TargetGroup(
        name="adapter",
        modules=modules,
        parameters=parameters,
        gate_up=tuple(name for name in parameters if name in gate_up),
    )
    targets = LoraTargets(groups=(group,), saved_modules=saved, ties_embeddings=tied)
    return _as_spec(config, targets, ranks, alphas, use_dora=use_dora), targets


def _adapted_parameters(
    config: AdapterConfig,
    rename: Callable[[str], str],
    skeleton: "PreTrainedModel",
    modules: Collection[str],
) -> tuple[str, ...]:
    """The parameters that have adapters of their own; `modules` have tensors of the adapter."""
    wanted = {*config.target_parameters, *map(rename, config.target_parameters)}
    return tuple(
        name
        for name, _ in skeleton.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[0] in modules
        and any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    )


def _as_spec(
    config: AdapterConfig,
    targets: LoraTargets,
    ranks: Mapping[str, int],
    alphas: Mapping[str, int],
    *,
    use_dora: bool,
) -> LoraSpec:
    """The section `lora` that describes the adapter; `ranks` and `alphas` are by full name."""
    [group] = targets.groups
    r, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return LoraSpec(
        method="lora",
        r=r,
        lora_alpha=alpha,
        lora_dropout=0,
        bias=config.bias,
        target_modules=group.modules,
        target_parameters=group.parameters or None,
        layers_to_transform=None,
        rank_pattern=exact({name: rank for name, rank in ranks.items() if rank != r}),
        alpha_pattern=exact({name: each for name, each in alphas.items() if each != alpha}),
        modules_to_save=targets.saved_modules or None,
        use_rslora=config.use_rslora,
        use_dora=use_dora,
        finetune_vision_layers=True,
        finetune_language_layers=True,
        finetune_attention_modules=None,
        finetune_mlp_modules=True,
        finetune_experts=None,
    )


def _saved(
    config: AdapterConfig, stored: Names, rename: Callable[[str], str], skeleton: "PreTrainedModel"
) -> tuple[tuple[str, ...], bool]:
    """The modules that the adapter stores whole, and whether its output layer is tied.

    Of nested modules, such as a connector, the outermost that `modules_to_save` names.
    """
    names = {rename(each.module) for each in stored.values() if each.part is None}
    wholes = {*config.modules_to_save, *map(rename, config.modules_to_save)}
    saved = list[str]()
    for name, _ in skeleton.named_modules():
        named = any(name == each or name.endswith(f".{each}") for each in wholes)
        stored_whole = named and any(each.startswith(f"{name}.") for each in names)
        if stored_whole and not any(name.startswith(f"{outer}.") for outer in saved):
            saved.append(name)
    unnamed = [each for each in names if not any(each.startswith(f"{name}.") for name in saved)]
    biases = config.bias != "none"
    saved += sorted(
        {each.rpartition(".")[0] for each in unnamed if not (biases and each.endswith(".bias"))}
    )
    embeddings, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return tuple(saved), False
    modules = dict(skeleton.named_modules())
    tied = [name for name in saved if modules[name] in (embeddings, head)]
    if len(tied) < 2:  # if one of the two, the shapes will tell that the other is missing
        return tuple(saved), bool(tied)
    first = next(name for name in tied if modules[name] is embeddings)
    return (first, *(name for name in saved if name not in tied)), True

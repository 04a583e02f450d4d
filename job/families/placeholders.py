"""Models without weights in memory, which are sharded before their weights are read.

Each weight is a placeholder: a view of one element that has the weight's shape and dtype, on the
device of the training, so a model answers as usual what it consists of and where it is. Adapters
and buffers are real. Nothing may compute with a placeholder.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from job.families.stored_weights import StoredWeights
from job.families.transformers_format import attention_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def model(
    build: "Callable[..., PreTrainedModel]",
    config: "PreTrainedConfig",
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
) -> "PreTrainedModel":
    """The model that `build` creates from the config, in evaluation mode.

    Non-persistent buffers are computed on the CPU, as Transformers does when it loads a checkpoint.
    """
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        built = build(config, dtype=dtype, **attention_arguments(attn_implementation))
    built.tie_weights()
    kept = _kept_in_fp32(built, dtype)
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in built.named_modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if weight not in replaced:
                own = torch.float32 if kept(f"{prefix}.{name}") else weight.dtype
                replaced[weight] = placeholder(weight.shape, own, device)
            module._parameters[name] = replaced[weight]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return built.eval()


def placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    element = torch.zeros((), dtype=dtype, device=device)
    return nn.Parameter(element.expand(shape), requires_grad=dtype.is_floating_point)


def names_by_weight(built: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The names of each weight: several if it is tied."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in built.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    return names


def read_buffers(built: nn.Module, stored: StoredWeights) -> None:
    """Reads the buffers that the checkpoint has, such as a router's correction bias."""
    persistent = built.state_dict().keys()
    for name, buffer in built.named_buffers():
        if name in persistent and name in stored:
            buffer.copy_(stored.read(name, buffer.dtype, buffer.device))


def untie_if_stored_apart(built: "PreTrainedModel", stored: StoredWeights) -> None:
    """Unties weights that the checkpoint has with different values, as Transformers does."""
    for target, source in list(built.all_tied_weights_keys.items()):
        if target not in stored or source not in stored:
            continue
        weight, cpu = built.get_parameter(target), torch.device("cpu")
        first, other = (stored.read(name, weight.dtype, cpu) for name in (source, target))
        if not torch.equal(first, other):
            parent, _, name = target.rpartition(".")
            own = placeholder(weight.shape, weight.dtype, weight.device)
            setattr(built.get_submodule(parent), name, own)
            built.all_tied_weights_keys.pop(target)


def _kept_in_fp32(built: "PreTrainedModel", dtype: torch.dtype) -> Callable[[str], bool]:
    """Which weights Transformers keeps in fp32 when it loads the model in `dtype`."""
    from transformers.core_model_loading import build_glob_alternation

    plan = built._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    pattern: re.Pattern[str] = build_glob_alternation(list(plan))[0]
    return lambda name: pattern.search(name) is not None

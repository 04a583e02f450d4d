"""FSDP2: every process holds a shard of each layer, and all-gathers it while it is computed.

Accelerate's plugin wraps each of the blocks in `_no_split_modules`. Trained weights and optimizer
state are gathered in full for checkpoints and for the adapter.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SCATTERED = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def config(model: torch.nn.Module) -> dict[str, Any]:
    """The `fsdp_config` of Transformers' training arguments: one FSDP unit per block."""
    unsplit = set(model._no_split_modules)  # type: ignore[arg-type]
    blocks = {
        type(module).__name__
        for module in model.modules()
        if any(base.__name__ in unsplit for base in type(module).__mro__)
    }
    return {
        "version": 2,
        "reshard_after_forward": True,
        "transformer_layer_cls_to_wrap": sorted(blocks),
        "state_dict_type": "FULL_STATE_DICT",
    }


def use_on_cpu(accelerator: "Accelerator", plugin_arguments: dict[str, Any]) -> None:
    """Makes Accelerate shard on a CPU, which it does not support by itself."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    accelerator.state.distributed_type = DistributedType.FSDP


def is_sharded(model: object) -> bool:
    return isinstance(model, FSDPModule)


def allow_unused_parameters(model: torch.nn.Module) -> None:
    """Lets processes use different weights in a step: all gradients are reduced regardless."""
    assert isinstance(model, FSDPModule)
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)
        return
    for module in model.modules():  # torch 2.11 has no such setting
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                reduce = partial(_reduce_all, group, group.post_backward)
                group.post_backward = reduce  # type: ignore[method-assign]


def _reduce_all(group: "FSDPParamGroup", reduce: Callable[..., None], *unused: object) -> None:
    """Reduces the gradients of a group of weights, zeros for those that have none."""
    for parameter in group.fsdp_params:
        if hasattr(parameter, "_unsharded_param") and parameter.unsharded_param.requires_grad:
            weight = parameter.unsharded_param
            if weight.grad is None and parameter.unsharded_accumulated_grad is None:
                weight.grad = torch.zeros_like(weight)
    reduce(*unused)


def trained_state(model: torch.nn.Module) -> dict[str, Any]:
    """The trained weights, gathered on rank 0's CPU; every process has to call it."""
    return get_model_state_dict(model, options=_GATHERED)


def load_trained_state(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Gives every process its shards of rank 0's trained weights, keyed by names in memory; every
    process has to call it, with an empty `state` on other ranks."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, state, options=options)


def reshard(model: torch.nn.Module) -> None:
    """Frees the gathered weights, which the root keeps for a backward pass that may not follow."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, gathered like `trained_state`, and keyed by parameter names."""
    return get_optimizer_state_dict(model, optimizer, options=_GATHERED)


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Gives every process its shard of rank 0's `state`."""
    set_optimizer_state_dict(model, optimizer, state, options=_SCATTERED)

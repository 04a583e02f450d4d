"""FSDP2: every process holds a share of each layer, and gathers a layer while it computes it.

Accelerate's plugin cuts the model by the blocks that it must not split; what is trained is put
together again for checkpoints and for the adapter.
"""

from typing import Any

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_TO_SHARES = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def config(model: Any) -> dict[str, Any]:
    """`fsdp_config` of Transformers' arguments for the model: a unit for each of its blocks."""
    whole = set(model._no_split_modules)
    blocks = {
        type(module).__name__
        for module in model.modules()
        if any(base.__name__ in whole for base in type(module).__mro__)
    }
    return {
        "version": 2,
        "reshard_after_forward": True,
        "transformer_layer_cls_to_wrap": sorted(blocks),
        "state_dict_type": "FULL_STATE_DICT",
    }


def use_on_cpu(accelerator: Any, plugin_arguments: dict[str, Any]) -> None:
    """Has Accelerate shard on a CPU as well, which it offers for devices only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    accelerator.state.distributed_type = DistributedType.FSDP


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def keep_step(model: FSDPModule) -> None:
    """Lets processes differ in which weights their rows use: all of them are summed anyway."""
    model.set_reduce_scatter_unused_params(True)


def trained_state(model: Any) -> dict[str, Any]:
    """What is trained, whole and on the CPU: in rank 0; all processes have to ask for it."""
    return get_model_state_dict(model, options=_WHOLE)


def optimizer_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """The same of the optimizer's state, by the parameters' names."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def restore_optimizer(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Gives every process its share of rank 0's `state`."""
    set_optimizer_state_dict(model, optimizer, state, options=_TO_SHARES)

"""FSDP2: every process holds a shard of each layer, and all-gathers it while it is computed.

Accelerate's plugin wraps each of the blocks in `_no_split_modules`, the embeddings and the output
layer; the root has all other weights. An adapter and its optimizer state are gathered in full for
checkpoints. Fully fine-tuned weights never are: `job.train.checkpoint.shard_files` stores the
shards, and `gathered_weights` gathers one tensor at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
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
from torch.distributed.tensor import DTensor

from job.distributed import process_group
from job.families.weight_files import NamedTensor, Weights

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


@contextmanager
def whole_weights_freed(model: torch.nn.Module) -> Iterator[None]:
    """A context in which sharding a block frees its whole weights at once.

    Accelerate would keep all of them until the last block is sharded, in a `state_dict` that it
    reads only if other processes have no weights.
    """
    vars(model)["state_dict"] = dict
    try:
        yield
    finally:
        del vars(model)["state_dict"]


def shard(accelerator: "Accelerator", model: torch.nn.Module) -> None:
    """Shards the model as `Accelerator.prepare` does, before there is an optimizer."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    with whole_weights_freed(model):
        fsdp2_prepare_model(accelerator, model)


@contextmanager
def optimizer_kept(accelerator: "Accelerator", optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context in which `Accelerator.prepare` leaves an optimizer of sharded weights as it is.

    It would replace them by those that it finds by address, for weights that it shards itself. The
    last processes may have shards without rows, which have no address.
    """
    prepare = accelerator.prepare
    groups = [list(group["params"]) for group in optimizer.param_groups]

    def prepared(*given: object) -> object:
        result = prepare(*given)
        for group, weights in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = weights
        return result

    vars(accelerator)["prepare"] = prepared
    try:
        yield
    finally:
        del vars(accelerator)["prepare"]


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


# Fully fine-tuned models.


def autocast_forward(model: torch.nn.Module, device: torch.device) -> None:
    """Makes the model compute in bf16, though its weights and what is communicated are fp32.

    FSDP2's own mixed precision would also cast router gates and the residual stream. Autocast keeps
    no copies of the weights until the end of the forward pass, which would be the whole model; with
    gradient checkpointing, the graph keeps none either.
    """
    autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    model.forward = MethodType(autocast(type(model).forward), model)


def drop_zero_gradients(model: torch.nn.Module) -> None:
    """Removes gradients that are zero in all processes.

    After a step without an image, those of weights that only images reach are. A single process
    has no gradients for them, so the optimizer leaves these weights alone; with zero gradients its
    momentum would move them.
    """
    given = [each for each in model.parameters() if each.grad is not None]
    used = torch.stack([local_shard(each.grad).any() for each in given if each.grad is not None])
    for parameter, count in zip(
        given, process_group.all_reduce_sum(used.int().tolist()), strict=True
    ):
        if count == 0:
            parameter.grad = None


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of the tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: DTensor) -> tuple[int, int]:
    """The first row of this process's shard, and the one after its last. FSDP2 shards the first
    dimension in equal chunks; the last ones may be smaller, or empty."""
    mesh = tensor.device_mesh
    rows: int = tensor.shape[0]
    chunk = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * chunk, rows)
    return first, first + len(tensor.to_local())


def sharded_like(local: torch.Tensor, like: DTensor) -> DTensor:
    """A tensor with this process's shard, sharded like another of the same shape, which may be on
    the meta device."""
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def gathered_weights(model: torch.nn.Module) -> Weights:
    """The weights of a sharded model, on rank 0; every other rank has to call `help_to_gather`."""
    sharded = dict(model.named_parameters())

    def gathered(names: Iterable[str]) -> Iterator[NamedTensor]:
        for name in names:
            process_group.broadcast(name)
            yield name, _full(sharded[name])
        process_group.broadcast(None)

    meta = {
        name: torch.empty(each.shape, dtype=each.dtype, device="meta")
        for name, each in sharded.items()
    }
    return Weights(meta_tensors=meta, tensors=gathered)


def help_to_gather(model: torch.nn.Module) -> None:
    """Takes part in gathering the tensors that rank 0 asks for."""
    sharded = dict(model.named_parameters())
    while (name := process_group.broadcast(None)) is not None:
        _full(sharded[name])


def _full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

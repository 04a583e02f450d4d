"""Weights that are read only once the model is sharded: each process reads its shards of them.

So no process ever holds the whole model, on its device or on the host. A tensor that is stored in
another form than the model's, such as experts that Transformers stacks, is read whole, one at a
time; of all others only a process's rows are read.
"""

import time
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from job import log
from job.engines import sharding
from job.engines.device import release_memory
from job.engines.free_memory import is_out_of_memory
from job.errors import OutOfMemoryError
from job.families.base import Family
from job.families.placeholders import names_by_weight
from job.families.stored_weights import StoredWeights

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class UnreadWeights:
    """The weights of a model of placeholders, which may be given an adapter meanwhile."""

    def __init__(self, family: Family, model: "PreTrainedModel") -> None:
        self._family, self._names = family, names_by_weight(model)

    def shard(self, accelerator: "Accelerator", model: nn.Module) -> None:
        """Shards the model as Accelerate does, and reads this process's shards.

        Raises InputError if the checkpoint lacks a weight, or has one of another shape, and
        OutOfMemoryError if the shards do not fit.
        """
        started = time.monotonic()
        unread = self._to_meta(model)
        sharding.shard(accelerator, model)
        try:
            self._read(accelerator, model, unread)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                "$.runtime.distributed",
                "a process's shards of the weights do not fit into its memory while they are read",
                value="fsdp2",
                fix="train with more processes, or on larger devices",
            ) from error
        log.info("shards of the weights read", took=log.seconds(time.monotonic() - started))

    def _read(
        self, accelerator: "Accelerator", model: nn.Module, unread: dict[str, list[str]]
    ) -> None:
        sharded = dict(model.named_parameters())
        with self._family.stored_weights() as stored:
            names = {
                next((each for each in known if each in stored), known[0]): name
                for name, known in unread.items()
            }
            read = {
                names[name]: _shard(stored, name, sharded[names[name]], accelerator.device)
                for name in stored.grouped(names)
            }
        _replace(model, {sharded[name]: weight for name, weight in read.items()})
        release_memory()  # of converted tensors

    def _to_meta(self, model: nn.Module) -> dict[str, list[str]]:
        """Replaces placeholders by weights on the meta device, which sharding leaves there.

        Returns the current name of each, with its names when the placeholders were made.
        """
        unread = {n: p for n, p in model.named_parameters() if p in self._names}
        _replace(model, {p: _meta(p) for p in unread.values()})
        return {name: self._names[placeholder] for name, placeholder in unread.items()}


def _meta(weight: nn.Parameter) -> nn.Parameter:
    meta = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=weight.requires_grad)


def _shard(
    stored: StoredWeights, name: str, weight: nn.Parameter, device: torch.device
) -> nn.Parameter:
    """This process's shard of a weight whose shards are on the meta device; `name` is stored."""
    assert isinstance(weight, DTensor), f"{name} is not sharded"
    rows = stored.rows(name, *sharding.own_rows(weight), tuple(weight.shape), weight.dtype, device)
    return nn.Parameter(sharding.sharded_like(rows, weight), weight.requires_grad)


def _replace(model: nn.Module, replaced: dict[nn.Parameter, nn.Parameter]) -> None:
    """Replaces weights in all modules that have them: a tied one is in several."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight in replaced:
                module._parameters[name] = replaced[weight]

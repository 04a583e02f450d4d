"""Checkpoints of fully fine-tuned, sharded models: each process stores and loads its own shards.

A checkpoint has a folder for each process, `weights/rank-N` and `states/rank-N`, with the rows of
every tensor that the process holds, in order of the ranks. Together they are the whole tensors, so
any number of processes can load them: each reads its rows from the files that have them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from job.distributed import process_group
from job.engines import sharding
from job.families import weight_writing
from job.families.weight_files import Weights
from job.train.checkpoint import state_files

if TYPE_CHECKING:
    from collections.abc import Iterable

WEIGHTS, STATES = "weights", "states"
"""Folders of a checkpoint: of the weights, and of the optimizer's states."""
FILE_SIZE = "5GB"
"""Of a file, at most: several are uploaded at the same time."""
_RANK = re.compile(r"rank-(\d+)")


class StoredShards:
    """The tensors in a folder that `write` has filled in all processes; reads headers only.

    Raises FileNotFoundError if there is none, and ValueError if shards are missing or do not fit
    together.
    """

    def __init__(self, folder: Path) -> None:
        found = {
            int(match[1]): path
            for path in folder.glob("rank-*")
            if (match := _RANK.fullmatch(path.name))
        }
        if not found:
            raise FileNotFoundError(None, None, str(folder))
        if [*sorted(found)] != [*range(len(found))]:
            raise ValueError(f"it has shards of the ranks {sorted(found)}")
        self._ranks = [_tensors(found[rank]) for rank in sorted(found)]
        names = self._ranks[0].keys()
        if any(each.keys() != names for each in self._ranks):
            raise ValueError("the processes have stored different tensors")
        self.tensors = {name: self._whole(name) for name in names}
        """The whole tensors by name, on the meta device."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor; all of a scalar, which every process has stored."""
        if self.tensors[name].ndim == 0:
            return _read(self._ranks[0][name][0], name)
        parts, first = [], 0
        for tensors in self._ranks:
            path, shard = tensors[name]
            last = first + len(shard)
            own = slice(max(start, first) - first, min(stop, last) - first)
            if own.start < own.stop:
                parts.append(_read(path, name, own))
            first = last
        if len(parts) == 1:
            return parts[0]
        whole = self.tensors[name]
        empty = torch.empty(0, *whole.shape[1:], dtype=whole.dtype)
        return torch.cat(parts) if parts else empty

    def _whole(self, name: str) -> torch.Tensor:
        shards = [tensors[name][1] for tensors in self._ranks]
        if len({(each.dtype, each.shape[1:]) for each in shards}) > 1:
            raise ValueError(f"the shards of {name} do not fit together")
        return shards[0] if shards[0].ndim == 0 else torch.cat(shards)


def store_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Writes this process's shards of the weights."""
    write(dict(model.named_parameters()), checkpoint / WEIGHTS)


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Gives the sharded model this process's shards of the weights."""
    stored = StoredShards(checkpoint / WEIGHTS)
    sharding.reshard(model)  # else gathered weights would hide the new ones
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            sharding.local_shard(parameter).copy_(_own_rows(stored, name, parameter))


def store_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> dict[str, Any]:
    """Writes this process's shards of the optimizer's states; returns its `state_dict` by names of
    parameters, without tensors."""
    names: dict[torch.Tensor, str] = {each: name for name, each in model.named_parameters()}
    states: dict[str, torch.Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                assert isinstance(value, torch.Tensor), f"{key} is no tensor"
                states[f"{key}/{names[parameter]}"] = value
        groups.append({**group, "params": [names[parameter] for parameter in group["params"]]})
    write(states, checkpoint / STATES)
    touched: dict[str, dict[str, torch.Tensor]]
    touched = {names[parameter]: {} for parameter, each in optimizer.state.items() if each}
    return {"state": touched, "param_groups": groups}


def load_optimizer(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: Path,
    rates: "Iterable[float]",
) -> None:
    """Gives the optimizer this process's shards of its states, and each group its learning rate."""
    stored = StoredShards(checkpoint / STATES)
    keys: dict[str, list[str]] = {}
    for each in stored.tensors:
        key, _, name = each.partition("/")
        keys.setdefault(name, []).append(key)
    names: dict[torch.Tensor, str] = {each: name for name, each in model.named_parameters()}
    state: dict[int, dict[str, torch.Tensor]] = {}
    groups = []
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        numbers = []
        for parameter in group["params"]:
            number = len(state)
            numbers.append(number)
            state[number] = {
                key: _own_state(stored, f"{key}/{names[parameter]}", parameter)
                for key in keys.get(names[parameter], ())
            }
        groups.append({**group, "params": numbers, "lr": rate})
    # The optimizer would take an empty state for one that it has to continue.
    kept = {number: each for number, each in state.items() if each}
    optimizer.load_state_dict({"state": kept, "param_groups": groups})


def stored_states(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's states in a checkpoint by parameter, on the meta device."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for each, tensor in StoredShards(checkpoint / STATES).tensors.items():
        key, _, name = each.partition("/")
        states.setdefault(name, {})[key] = tensor
    return states


def write(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes this process's shards of the tensors, piece by piece: no copy of them is made."""
    own = ((name, sharding.local_shard(each.detach())) for name, each in tensors.items())
    directory = folder / f"rank-{process_group.rank()}"
    weight_writing.write(Weights.of(own), directory, max_shard_size=FILE_SIZE)


def _own_rows(stored: StoredShards, name: str, parameter: DTensor) -> torch.Tensor:
    return stored.rows(name, *sharding.own_rows(parameter))


def _own_state(stored: StoredShards, name: str, parameter: torch.Tensor) -> torch.Tensor:
    assert isinstance(parameter, DTensor)
    if stored.tensors[name].ndim == 0:
        return stored.rows(name, 0, 0)
    rows = _own_rows(stored, name, parameter).to(parameter.device)
    return sharding.sharded_like(rows, parameter)


def _tensors(directory: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """A process's tensors by name, on the meta device, with their files."""
    return {
        name: (path, tensor)
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in state_files.headers(path).items()
    }


def _read(path: Path, name: str, rows: slice | None = None) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        read: torch.Tensor
        read = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        return read

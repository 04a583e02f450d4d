"""Checks that a checkpoint matches the training in memory, before anything is loaded.

Names, shapes and dtypes are read from the files' headers. Checking first makes loading all or
nothing: a mismatch found halfway would leave the training partly overwritten.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from job.engines.parameter_groups import NAME
from job.train.checkpoint import random_state, shard_files, state_files

if TYPE_CHECKING:
    from transformers import Trainer

ADAPTER_WEIGHTS = "adapter_model.safetensors"
STATE, OPTIMIZER, SCHEDULER, RANDOM_STATE = (
    "trainer_state.json",
    "optimizer",
    "scheduler",
    "rng_state",
)
KIND, UNTOUCHED = "kind", "untouched"
"""Extra keys of an optimizer's state: its class, and the parameters that have had no gradient."""

Tensors = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]

# Optimizer states whose shapes follow from the parameter's.
_SHAPES: Mapping[str, Callable[[Shape], Shape]] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "state1", "state2"), lambda shape: shape),
    "exp_avg_sq": lambda shape: shape,
    "exp_avg_sq_row": lambda shape: shape[:-1],
    "exp_avg_sq_col": lambda shape: shape[:-2] + shape[-1:],
}
# States that an optimizer requires.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Adafactor": ("step", "RMS"),
}


class ContentMismatch(ValueError):
    """A file of a checkpoint does not match this training."""


def resume_problem(directory: Path, trainer: "Trainer") -> str | None:
    """Why the trainer cannot resume from the checkpoint in `directory`; None if it can."""
    parts: tuple[tuple[str, Callable[[], None]], ...] = (
        (STATE, lambda: _state(directory)),
        (weights_file(trainer), lambda: _weights(directory, trainer)),
        (OPTIMIZER, lambda: _optimizer(directory, trainer)),
        (SCHEDULER, lambda: _scheduler(directory, trainer)),
        (RANDOM_STATE, lambda: _random_states(directory)),
    )
    return next(filter(None, (_problem(name, check) for name, check in parts)), None)


def weights_problem(directory: Path, trainer: "Trainer") -> str | None:
    """Why the weights of a checkpoint are not those of the trainer's model; None if they are."""
    return _problem(weights_file(trainer), lambda: _weights(directory, trainer))


def _problem(name: str, check: Callable[[], None]) -> str | None:
    """What is wrong with the file, according to `check`."""
    try:
        check()
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename or name).name}"
    except ContentMismatch as error:
        return f"{name}: {error}"
    # Reading a malformed file may raise any of these.
    except (
        *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError),
        SafetensorError,
    ) as error:
        return f"{name} cannot be read: {type(error).__name__}: {error}"
    return None


def stores_shards(trainer: "Trainer") -> bool:
    """Whether every process stores its shards: of a fully fine-tuned, sharded model."""
    return bool(trainer.is_fsdp_enabled) and not isinstance(trainer.model, PeftModel)


def weights_file(trainer: "Trainer") -> str:
    """The name of the file with the trained weights, or of the folder with their shards."""
    if stores_shards(trainer):
        return shard_files.WEIGHTS
    return ADAPTER_WEIGHTS if isinstance(trainer.model, PeftModel) else SAFE_WEIGHTS_NAME


def _step(directory: Path) -> int:
    return int(TrainerState.load_from_json(str(directory / STATE)).global_step)


def _state(directory: Path) -> None:
    state = TrainerState.load_from_json(str(directory / STATE))
    counts = (state.global_step, state.num_input_tokens_seen)
    if not all(isinstance(count, int) for count in counts) or state.global_step < 1:
        raise ContentMismatch("it lacks the step or the number of tokens seen")
    for entry in state.log_history:
        if not isinstance(entry["step"], int) or not isinstance(entry["epoch"], int | float):
            raise ContentMismatch(f"log_history has {entry}")


def _weights(directory: Path, trainer: "Trainer") -> None:
    """Requires exactly the trained weights, by name, shape and dtype."""
    path = directory / weights_file(trainer)
    model = trainer.model
    sharded = stores_shards(trainer)
    if not path.exists():
        if not sharded and (directory / shard_files.WEIGHTS).is_dir():
            raise ContentMismatch("its weights are shards, of runtime.distributed: fsdp2")
        if sharded and (directory / SAFE_WEIGHTS_NAME).exists():
            raise ContentMismatch("its weights are whole, not shards of runtime.distributed: fsdp2")
        raise FileNotFoundError(None, None, str(path))
    stored = shard_files.StoredShards(path).tensors if sharded else state_files.headers(path)
    wanted: Tensors
    shared = set[str]()
    if sharded:
        wanted = dict(model.named_parameters())
    elif isinstance(model, PeftModel):
        wanted = get_peft_model_state_dict(model)
    else:
        wanted = model.state_dict()
        shared = _shared(wanted, stored)
    if missing := wanted.keys() - stored.keys() - shared:
        raise ContentMismatch(f"{_some(missing)} missing")
    if unknown := stored.keys() - wanted.keys():
        raise ContentMismatch(f"{_some(unknown)} not of this model")
    for name, tensor in stored.items():
        _require_like(name, tensor, tuple(wanted[name].shape), wanted[name].dtype)


def _shared(wanted: Tensors, stored: Iterable[str]) -> set[str]:
    """Names of tied weights, which are stored under another name."""
    addresses = {wanted[name].data_ptr() for name in stored if name in wanted}
    return {name for name, tensor in wanted.items() if tensor.data_ptr() in addresses}


def _optimizer(directory: Path, trainer: "Trainer") -> None:
    state = state_files.load(directory / OPTIMIZER, meta=True)
    optimizer = _unwrapped_optimizer(trainer)
    kind = type(optimizer).__name__
    if (stored_kind := state.get(KIND, kind)) != kind:
        raise ContentMismatch(f"it belongs to {stored_kind}, but this training uses {kind}")
    parameters = _parameters(trainer, optimizer, state["param_groups"])
    states = shard_files.stored_states(directory) if stores_shards(trainer) else state["state"]
    if unknown := states.keys() - parameters.keys():
        raise ContentMismatch(f"{_some(unknown)} not of this model")
    if (untouched := state.get(UNTOUCHED)) is not None and (
        missing := parameters.keys() - states.keys() - set(untouched)
    ):
        raise ContentMismatch(f"the state of parameter {_some(missing)} missing")
    for key, stored in states.items():
        if missing := set(_NEEDED.get(kind, ())) - stored.keys():
            raise ContentMismatch(f"in the state of parameter {key}, {_some(missing)} missing")
        shape, dtype = tuple(parameters[key].shape), parameters[key].dtype
        for name, value in stored.items():
            if name in _SHAPES and isinstance(value, torch.Tensor):
                expected = dtype if kind == "AdamW" else value.dtype
                _require_like(f"{name} of {key}", value, _SHAPES[name](shape), expected)


def _unwrapped_optimizer(trainer: "Trainer") -> torch.optim.Optimizer:
    """The optimizer without Accelerate's wrapper."""
    optimizer = trainer.create_optimizer()
    unwrapped: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return unwrapped


def _parameters(
    trainer: "Trainer", optimizer: torch.optim.Optimizer, stored_groups: Sequence[Mapping[str, Any]]
) -> dict[Any, torch.Tensor]:
    """The trained parameters by their keys in the stored optimizer state: numbers, or names if the
    model is sharded."""
    if trainer.is_fsdp_enabled:
        named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        if named.keys() != {name for group in stored_groups for name in group["params"]}:
            raise ContentMismatch("its parameters are not this model's")
        return named
    names = [[group.get(NAME) for group in g] for g in (stored_groups, optimizer.param_groups)]
    if names[0] != names[1]:
        raise ContentMismatch(
            f"its parameter groups are {names[0]}, but this training's are {names[1]}"
        )
    groups = [group["params"] for group in optimizer.param_groups]
    counts, stored = [len(group) for group in groups], [len(g["params"]) for g in stored_groups]
    if counts != stored:
        raise ContentMismatch(
            f"its parameter groups have {stored} parameters, but this training's have {counts}"
        )
    parameters = [parameter for group in groups for parameter in group]
    keys = [key for group in stored_groups for key in group["params"]]
    if sorted(keys) != list(range(len(parameters))):
        raise ContentMismatch("its parameters are not numbered from 0")
    return dict(zip(keys, parameters, strict=True))


def _scheduler(directory: Path, trainer: "Trainer") -> None:
    state, step = state_files.load(directory / SCHEDULER), _step(directory)
    groups = len(_unwrapped_optimizer(trainer).param_groups)
    if state["last_epoch"] != step:
        raise ContentMismatch(f"it is at step {state['last_epoch']}, but the checkpoint at {step}")
    for name in ("base_lrs", "_last_lr"):
        if len(state[name]) != groups or not all(isinstance(r, int | float) for r in state[name]):
            raise ContentMismatch(
                f"{name} is {state[name]}, not one number for each of {groups} groups"
            )


def _random_states(directory: Path) -> None:
    """Checks every process's random state and its losses since the last log."""
    for path in sorted(
        {directory / f"{RANDOM_STATE}.json", *directory.glob(f"{RANDOM_STATE}*.json")}
    ):
        state = state_files.load(path.with_suffix(""))
        random_state.check(state)
        if state["loss"].shape != () or not isinstance(state["logged"], int):
            raise ContentMismatch("it has no losses since the last log")


def _require_like(name: str, tensor: torch.Tensor, shape: Shape, dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise ContentMismatch(
            f"{name} has the shape {list(tensor.shape)}, but this training needs {list(shape)}"
        )
    if tensor.dtype != dtype:
        raise ContentMismatch(f"{name} is {tensor.dtype}, but this training needs {dtype}")


def _some(names: Iterable[Any]) -> str:
    """The first name and the number of others, with the verb."""
    first, *more = sorted(map(str, names))
    return f"{first} and {len(more)} more are" if more else f"{first} is"

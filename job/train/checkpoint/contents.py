"""What a checkpoint has to hold, compared with the training in memory before anything of it is
loaded.

Names, shapes and types are read from the files' headers. A checkpoint is loaded whole or not at
all: one that is found wrong halfway would have overwritten what an older one still needs.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from job.train.checkpoint import state_files

if TYPE_CHECKING:
    from transformers import Trainer

ADAPTER_WEIGHTS = "adapter_model.safetensors"
STATE, OPTIMIZER, SCHEDULER, GENERATORS = (
    "trainer_state.json",
    "optimizer",
    "scheduler",
    "rng_state",
)
KIND, UNTOUCHED = "kind", "untouched"
"""Beside an optimizer's state: its class, and the parameters that no gradient has reached yet."""

Tensors = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]

# What optimizers keep of a parameter in a shape that follows from its own.
_SHAPES: Mapping[str, Callable[[Shape], Shape]] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "state1", "state2"), lambda shape: shape),
    "exp_avg_sq": lambda shape: shape,
    "exp_avg_sq_row": lambda shape: shape[:-1],
    "exp_avg_sq_col": lambda shape: shape[:-2] + shape[-1:],
}
# What they cannot do without.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Adafactor": ("step", "RMS"),
}


class Unfit(ValueError):
    """A file of a checkpoint does not hold what the training needs."""


def problem(directory: Path, trainer: "Trainer") -> str | None:
    """What keeps the trainer from going on from the checkpoint in `directory`, or None."""
    parts: tuple[tuple[str, Callable[[], None]], ...] = (
        (STATE, lambda: _state(directory)),
        (_weights_file(trainer), lambda: _weights(directory, trainer)),
        (OPTIMIZER, lambda: _optimizer(directory, trainer)),
        (SCHEDULER, lambda: _scheduler(directory, trainer)),
        (GENERATORS, lambda: _generators(directory)),
    )
    for name, check in parts:
        try:
            check()
        except FileNotFoundError as error:
            return f"it has no {Path(error.filename or name).name}"
        except Unfit as error:
            return f"{name}: {error}"
        # Whatever a file of other content makes its readers raise.
        except (
            *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError),
            SafetensorError,
        ) as error:
            return f"{name} cannot be read: {type(error).__name__}: {error}"
    return None


def _weights_file(trainer: "Trainer") -> str:
    return ADAPTER_WEIGHTS if isinstance(trainer.model, PeftModel) else SAFE_WEIGHTS_NAME


def _step(directory: Path) -> int:
    return int(TrainerState.load_from_json(str(directory / STATE)).global_step)


def _state(directory: Path) -> None:
    state = TrainerState.load_from_json(str(directory / STATE))
    counts = (state.global_step, state.num_input_tokens_seen)
    if not all(isinstance(count, int) for count in counts) or state.global_step < 1:
        raise Unfit("it does not say after which step, or how many tokens, it was stored")
    for entry in state.log_history:
        if not isinstance(entry["step"], int) or not isinstance(entry["epoch"], int | float):
            raise Unfit(f"log_history has {entry}")


def _weights(directory: Path, trainer: "Trainer") -> None:
    """Every weight that is trained, by its name, shape and type, and no other."""
    path = directory / _weights_file(trainer)
    if not path.exists():
        raise FileNotFoundError(None, None, str(path))
    stored = state_files.headers(path)
    model = trainer.model
    if isinstance(model, PeftModel):
        wanted: Tensors = get_peft_model_state_dict(model)
        shared = set[str]()
    else:
        wanted = model.state_dict()
        shared = _shared(wanted, stored)
    if missing := wanted.keys() - stored.keys() - shared:
        raise Unfit(f"{_some(missing)} missing")
    if strange := stored.keys() - wanted.keys():
        raise Unfit(f"{_some(strange)} not of this model")
    for name, tensor in stored.items():
        _require_like(name, tensor, tuple(wanted[name].shape), wanted[name].dtype)


def _shared(wanted: Tensors, stored: Iterable[str]) -> set[str]:
    """The names of tensors that are stored under another name, as tied weights are."""
    places = {wanted[name].data_ptr() for name in stored if name in wanted}
    return {name for name, tensor in wanted.items() if tensor.data_ptr() in places}


def _optimizer(directory: Path, trainer: "Trainer") -> None:
    state = state_files.load(directory / OPTIMIZER, meta=True)
    optimizer = _own_optimizer(trainer)
    kind = type(optimizer).__name__
    if (stored_kind := state.get(KIND, kind)) != kind:
        raise Unfit(f"it is of {stored_kind}, and this training takes {kind}")
    parameters = _parameters(trainer, optimizer, state["param_groups"])
    states = state["state"]
    if strange := states.keys() - parameters.keys():
        raise Unfit(f"{_some(strange)} not of this model")
    if (untouched := state.get(UNTOUCHED)) is not None and (
        missing := parameters.keys() - states.keys() - set(untouched)
    ):
        raise Unfit(f"of the parameters' states {_some(missing)} missing")
    for key, kept in states.items():
        if missing := set(_NEEDED.get(kind, ())) - kept.keys():
            raise Unfit(f"of parameter {key} {_some(missing)} missing")
        shape, dtype = tuple(parameters[key].shape), parameters[key].dtype
        for name, value in kept.items():
            if name in _SHAPES and isinstance(value, torch.Tensor):
                of_kind = dtype if kind == "AdamW" else value.dtype
                _require_like(f"{name} of {key}", value, _SHAPES[name](shape), of_kind)


def _own_optimizer(trainer: "Trainer") -> Any:
    """The optimizer itself, without Accelerate's around it."""
    optimizer = trainer.create_optimizer()
    return getattr(optimizer, "optimizer", optimizer)


def _parameters(
    trainer: "Trainer", optimizer: Any, stored_groups: Sequence[Mapping[str, Any]]
) -> dict[Any, torch.Tensor]:
    """What is trained by the keys of an optimizer's stored state: numbers, or names where the
    model is in shares."""
    if trainer.is_fsdp_enabled:
        named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        if named.keys() != {name for group in stored_groups for name in group["params"]}:
            raise Unfit("its parameters are not those of this model")
        return named
    groups = [group["params"] for group in optimizer.param_groups]
    counts, stored = [len(group) for group in groups], [len(g["params"]) for g in stored_groups]
    if counts != stored:
        raise Unfit(f"it has groups of {stored} parameters, and this training of {counts}")
    every = [parameter for group in groups for parameter in group]
    keys = [key for group in stored_groups for key in group["params"]]
    if sorted(keys) != list(range(len(every))):
        raise Unfit("its parameters are not numbered from 0 on")
    return dict(zip(keys, every, strict=True))


def _scheduler(directory: Path, trainer: "Trainer") -> None:
    state, step = state_files.load(directory / SCHEDULER), _step(directory)
    groups = len(_own_optimizer(trainer).param_groups)
    if state["last_epoch"] != step:
        raise Unfit(f"it is at step {state['last_epoch']}, and the checkpoint at {step}")
    for name in ("base_lrs", "_last_lr"):
        if len(state[name]) != groups or not all(isinstance(r, int | float) for r in state[name]):
            raise Unfit(f"{name} is {state[name]}, and not one number for each of {groups} groups")


def _generators(directory: Path) -> None:
    """Those of every process; generators of their own take the states to try them."""
    for path in sorted({directory / f"{GENERATORS}.json", *directory.glob(f"{GENERATORS}*.json")}):
        states = state_files.load(path.with_suffix(""))
        random.Random().setstate(states["python"])  # noqa: S311 - no secret
        np.random.RandomState().set_state(states["numpy"])
        torch.Generator().set_state(states["torch"])
        if states["loss"].shape != () or not isinstance(states["logged"], int):
            raise Unfit("it has no losses since the last log")
        if "cuda" in states and torch.cuda.is_available():
            torch.Generator(device="cuda").set_state(states["cuda"])


def _require_like(name: str, tensor: torch.Tensor, shape: Shape, dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise Unfit(f"{name} has the shape {list(tensor.shape)}, and this training {list(shape)}")
    if tensor.dtype != dtype:
        raise Unfit(f"{name} is {tensor.dtype}, and this training has {dtype}")


def _some(names: Iterable[Any]) -> str:
    """The first of the names, and how many more; with the verb for as many."""
    first, *more = sorted(map(str, names))
    return f"{first} and {len(more)} more are" if more else f"{first} is"

"""The random state of a process: Python, NumPy, torch and, on a GPU, CUDA (or ROCm)."""

import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.random.set_rng_state(state["cuda"])


def check(state: dict[str, Any]) -> None:
    """Raises if `restore` would; changes no generator of this process."""
    random.Random().setstate(state["python"])  # noqa: S311 - no secret
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.Generator(device="cuda").set_state(state["cuda"])

"""The types of this project's own `torch.autograd.Function`s."""

from typing import Protocol

import torch


class Context(Protocol):
    """What the methods of a function are given; a function that stores more extends it."""

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]: ...

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...

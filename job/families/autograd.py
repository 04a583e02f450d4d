"""The type of `ctx` in this project's `torch.autograd.Function`s."""

from typing import Protocol

import torch


class Context(Protocol):
    """`ctx` of `forward` and `backward`; functions that store attributes on it extend this."""

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]: ...

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...

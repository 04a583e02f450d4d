"""Gradients in buffers of fixed addresses, one per dtype.

A captured backward pass adds to the addresses that it was captured with. One buffer also needs one
kernel to clear, and one collective to sum over the processes.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from job.distributed import process_group


class FlatGradients:
    """The gradients of some parameters, all zero at first."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self._buffers: list[torch.Tensor] = []
        self._views: dict[torch.nn.Parameter, torch.Tensor] = {}
        for group in by_dtype.values():
            sizes = [parameter.numel() for parameter in group]
            buffer = torch.zeros(sum(sizes), dtype=group[0].dtype, device=group[0].device)
            self._buffers.append(buffer)
            for parameter, part in zip(group, buffer.split(sizes), strict=True):
                self._views[parameter] = part.view_as(parameter)

    def attach(self, parameters: Iterable[torch.nn.Parameter] | None = None) -> None:
        """Makes the buffers the gradients of these parameters, by default of all."""
        for parameter in self._views if parameters is None else parameters:
            parameter.grad = self._views[parameter]

    def detach(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Leaves these parameters without a gradient, until `attach`."""
        for parameter in parameters:
            parameter.grad = None

    def zero(self) -> None:
        for buffer in self._buffers:
            buffer.zero_()

    def release(self) -> None:
        """Frees the buffers."""
        self._buffers.clear()
        self._views.clear()

    def average(self) -> None:
        """Averages over all processes, as DDP does."""
        if process_group.size() == 1:
            return
        for buffer in self._buffers:
            dist.all_reduce(buffer, op=dist.ReduceOp.AVG)

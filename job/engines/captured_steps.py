"""Forward and backward passes captured as CUDA graphs (HIP graphs on ROCm), one for each bucket.

A small pass takes the host far longer to launch than the device to compute. A graph launches all
its kernels at once, on fixed addresses: a batch is copied into the graph's inputs, and gradients
are added to `FlatGradients`. The graphs share one memory pool, because no two run at once.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from job.engines.device import release_memory
from job.engines.flat_gradients import FlatGradients
from job.families.batches import MicroBatch, model_inputs

Inputs = dict[str, torch.Tensor]
Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Captures what the work launches; the result launches it again."""


class CaptureFailed(Exception):
    """The passes cannot be captured; the message says why."""


@dataclass(frozen=True, kw_only=True)
class _Graph:
    inputs: Inputs
    share: torch.Tensor
    """(): the factor of the loss."""
    loss: torch.Tensor
    """(): the loss of the last replay, times `share`."""
    replay: Work


class CapturedSteps:
    """Runs forward and backward passes of micro-batches by their bucket's graph."""

    def __init__(
        self, model: torch.nn.Module, batches: Sequence[Inputs], capture: Capture | None = None
    ) -> None:
        """Captures a pass over each of the batches, the largest first: one for each bucket.

        They are on the model's device, and the model is in training mode. `capture` is for tests.

        Raises CaptureFailed, after which the model is as before; an out-of-memory error too.
        """
        started = time.monotonic()
        self._model, self._capture = model, capture or _graphs()
        self._graphs: list[_Graph] = []
        self.gradients = FlatGradients([])
        """Of the parameters that get a gradient from a batch."""
        try:
            with _unchanged_random_state():
                self.gradients = FlatGradients(self._trained(batches))
                self.gradients.attach()
                release_memory()  # of the passes so far: graphs have memory of their own
                for batch in batches:
                    self._graphs.append(self._captured(batch))
        except RuntimeError as error:
            self.release()
            raise CaptureFailed(str(error).partition("\n")[0]) from error
        self.gradients.zero()
        self.seconds = time.monotonic() - started
        """How long the captures took."""

    def forward_backward(self, batch: MicroBatch, share: float) -> torch.Tensor:
        """Adds the gradients of the batch's loss times `share`; returns that product, a scalar.

        The result is valid until the next call. Runs eagerly if the batch is in no bucket.
        """
        inputs = cast(Inputs, model_inputs(batch))
        number = batch.get("bucket")
        graph = None if number is None else self._graphs[number]
        if graph is None or not _equal_shapes(inputs, graph.inputs):
            return self._pass(inputs, share)
        torch._foreach_copy_(
            list(graph.inputs.values()), [inputs[name] for name in graph.inputs], non_blocking=True
        )
        graph.share.fill_(share)
        graph.replay()
        return graph.loss

    def release(self) -> None:
        """Frees the graphs and their memory; drops the gradients."""
        self._graphs.clear()
        self.gradients.release()
        self._model.zero_grad(set_to_none=True)

    def _trained(self, batches: Sequence[Inputs]) -> list[torch.nn.Parameter]:
        """The parameters that get a gradient from any of the batches.

        Their passes load kernels and compile, neither of which can be captured.
        """
        with _side_stream():
            for batch in batches:
                self._pass(batch, 1.0)
        trained = [p for p in self._model.parameters() if p.grad is not None]
        self._model.zero_grad(set_to_none=True)
        return trained

    def _captured(self, batch: Inputs) -> _Graph:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        share, loss = (torch.zeros((), device=inputs["input_ids"].device) for _ in range(2))

        def work() -> None:
            loss.copy_(self._pass(inputs, share))

        return _Graph(inputs=inputs, share=share, loss=loss, replay=self._capture(work))

    def _pass(self, inputs: Inputs, share: torch.Tensor | float) -> torch.Tensor:
        loss: torch.Tensor = self._model(**inputs).loss * share
        loss.backward()
        return loss.detach()


def _graphs() -> Capture:
    """Captures as CUDA graphs in one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the data loader's that pins memory, may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return capture


@contextmanager
def _side_stream() -> Iterator[None]:
    """A context whose work runs on another stream than the default one, as captures need."""
    if not torch.cuda.is_available():
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _unchanged_random_state() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _equal_shapes(inputs: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return inputs.keys() == others.keys() and all(
        tensor.shape == others[name].shape for name, tensor in inputs.items()
    )

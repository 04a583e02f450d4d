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

from job import log
from job.distributed import process_group
from job.engines.device import release_memory
from job.engines.flat_gradients import FlatGradients
from job.families.batches import MicroBatch, model_inputs

Inputs = dict[str, torch.Tensor]
"""The tensors of a batch, with their shapes in `job.families.batches`."""
Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Captures what the work launches; the result launches it again."""


class CaptureFailed(RuntimeError):
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
        self,
        model: torch.nn.Module,
        batches: Sequence[Inputs],
        *,
        without_images: Inputs | None = None,
        capture: Capture | None = None,
    ) -> None:
        """Captures a pass over each of the batches, the largest first: one for each bucket.

        They are on the model's device, and the model is in training mode. `without_images` is a
        batch without images, unpadded, if the training has any. `capture` is for tests. All
        processes of a group have to call it.

        Raises CaptureFailed, after which the model is as before; an out-of-memory error too.
        """
        started = time.monotonic()
        self._model, self._capture = model, capture or _graphs()
        self._graphs: list[_Graph] = []
        self._gradients = FlatGradients([])
        self._of_images: list[torch.nn.Parameter] = []
        try:
            with _unchanged_random_state():
                trained, of_images = self._trained(batches, without_images)
                self._gradients = FlatGradients(trained)
                self._of_images = of_images
                self.start()
                release_memory()  # of the passes so far: graphs have memory of their own
                for batch in batches:
                    self._graphs.append(self._captured(batch))
        except RuntimeError as error:
            self.release()
            raise CaptureFailed(str(error).partition("\n")[0]) from error
        self._gradients.zero()
        self.seconds = time.monotonic() - started
        """How long the captures took."""

    def start(self) -> None:
        """Makes the buffers the gradients, which `zero_grad` may have dropped."""
        self._gradients.attach()

    def finish_step(self, images: int) -> None:
        """Completes the gradients of a step; `images` counts those of all processes' rows.

        Averages gradients over the processes. Without an image, parameters that only images reach
        get none, as in an eager step: the optimizer would move them by its momentum.
        """
        self._gradients.average()
        if not images:
            self._gradients.detach(self._of_images)

    def zero(self) -> None:
        """Sets all gradients to zero, for the next step."""
        self._gradients.zero()
        self._gradients.attach(self._of_images)

    def forward_backward(self, batch: MicroBatch, share: float) -> torch.Tensor:
        """Adds the gradients of the batch's loss times `share`; returns that product ().

        The result is valid until the next call. Runs eagerly if the batch is in no bucket.
        """
        inputs = cast(Inputs, model_inputs(batch))
        number = batch.get("bucket")
        graph = None if number is None else self._graphs[number]
        if graph is None or not _equal_shapes(inputs, graph.inputs):
            return self._eagerly(inputs, share)
        torch._foreach_copy_(
            list(graph.inputs.values()), [inputs[name] for name in graph.inputs], non_blocking=True
        )
        graph.share.fill_(share)
        graph.replay()
        return graph.loss

    def release(self) -> None:
        """Frees the graphs and their memory; drops the gradients."""
        self._graphs.clear()
        self._gradients.release()
        self._model.zero_grad(set_to_none=True)

    def _trained(
        self, batches: Sequence[Inputs], without_images: Inputs | None
    ) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """The trained parameters of all processes, and the subset that is reached only by images.

        The passes load kernels and compile, neither of which can be captured.
        """
        parameters, failure = list(self._model.parameters()), None
        texts, every = set[int](), set[int]()
        try:
            with _side_stream():
                if without_images is not None:
                    self._pass(without_images, 1.0)
                    texts = {n for n, p in enumerate(parameters) if p.grad is not None}
                for batch in batches:
                    self._pass(batch, 1.0)
                every = {n for n, p in enumerate(parameters) if p.grad is not None}
        except RuntimeError as error:
            failure = error
        # A failed process takes part too: the others wait for it.
        found = process_group.all_gather((failure is None, every, texts))
        if failure is not None:
            raise failure
        if not all(succeeded for succeeded, *_ in found):
            raise CaptureFailed("it failed in another process")
        self._model.zero_grad(set_to_none=True)
        every, texts = (set[int]().union(*(sets[n] for _, *sets in found)) for n in (0, 1))
        of_images = every - texts if texts else set[int]()
        return (
            [parameters[number] for number in sorted(every)],
            [parameters[number] for number in sorted(of_images)],
        )

    def _captured(self, batch: Inputs) -> _Graph:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        share, loss = (torch.zeros((), device=inputs["input_ids"].device) for _ in range(2))

        def work() -> None:
            loss.copy_(self._pass(inputs, share))

        return _Graph(inputs=inputs, share=share, loss=loss, replay=self._capture(work))

    def _eagerly(self, inputs: Inputs, share: float) -> torch.Tensor:
        log.debug("a batch has no graph", tokens=inputs["input_ids"].numel())
        return self._pass(inputs, share)

    def _pass(self, inputs: Inputs, share: torch.Tensor | float) -> torch.Tensor:
        loss: torch.Tensor = self._model(**inputs).loss * share
        loss.backward()
        return loss.detach()


def _graphs() -> Capture:
    """Captures as CUDA graphs in one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with (
            # A capture that fails does not leave its stream by itself.
            torch.cuda.stream(torch.cuda.current_stream()),
            # Other threads, such as the data loader's that pins memory, may go on meanwhile.
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
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

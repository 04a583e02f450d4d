"""Decoding steps captured as CUDA or HIP graphs: a step's kernels start without the host.

A graph replays the kernels of one shape: so many rows, and so many stored tokens of each. A step
with fewer of either is computed at the next larger shape, and what is too much is masked. The
graphs share one memory pool: only one of them runs at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from job import log

Step = Callable[[int, int], torch.Tensor]
"""Computes a step, by the number of rows and of the stored tokens that each attends to; returns
logits (rows, V)."""

SHORTEST = 256
"""The fewest stored tokens of a shape; each larger one has twice as many as the next."""
FEWER_ROWS = (1, 4, 16)
"""The divisors of the most rows that give the shapes' rows. Each shape takes time to capture."""
ALIGNMENT = 64
"""Stored tokens are a multiple of this: attention kernels need aligned masks."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shapes in which steps are computed: numbers of rows and of stored tokens, ascending."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, *, rows: int, capacity: int) -> "Shapes":
        """For at most `rows` rows of `capacity` tokens, which is rounded up."""
        lengths = [capacity + -capacity % ALIGNMENT]
        while lengths[0] // 2 >= SHORTEST:
            half = -(-lengths[0] // 2)
            lengths.insert(0, half + -half % ALIGNMENT)
        every = sorted({-(-rows // divisor) for divisor in FEWER_ROWS})
        return cls(rows=tuple(every), lengths=tuple(lengths))

    def fitting(self, rows: int, length: int) -> tuple[int, int]:
        """The smallest shape with at least `rows` rows of `length` stored tokens."""
        return (
            next(most for most in self.rows if most >= rows),
            next(most for most in self.lengths if most >= length),
        )


class StepGraphs:
    """Replays a step, after one call of its shape without a graph.

    That first call proves that the step does not wait for the device. If it does, or if capturing
    fails, all steps run without graphs, which a line in the log explains.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor] | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._enabled = True

    @property
    def captured(self) -> int:
        """The number of graphs."""
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(self, step: Step, rows: int, length: int) -> torch.Tensor:
        """The step of this shape, one of `Shapes`; `step` is the same at each call.

        It is not kept: together with its decoder, whose memory is large, it would be a cycle.
        """
        if not self._enabled:
            return step(rows, length)
        shape = rows, length
        if shape not in self._graphs:
            self._graphs[shape] = None
            return self._first(step, shape)
        captured = self._graphs[shape] or self._captured(step, shape)
        if captured is None:
            return step(rows, length)
        graph, logits = captured
        graph.replay()
        return logits

    def _first(self, step: Step, shape: tuple[int, int]) -> torch.Tensor:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_sync_debug_mode(before)
            self._give_up(error)
            return step(*shape)  # what was stored is stored again
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _captured(
        self, step: Step, shape: tuple[int, int]
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor] | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                # A capture that fails does not leave its stream by itself.
                torch.cuda.stream(torch.cuda.current_stream()),
                # Other threads, such as one that pins the memory of training batches, may go on.
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                logits = step(*shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._give_up(error)
            return None
        self._graphs[shape] = graph, logits
        return graph, logits

    def _give_up(self, error: RuntimeError) -> None:
        self._enabled = False
        self._graphs.clear()
        log.info(
            "generation runs without graphs, and slower: its step cannot be captured",
            reason=str(error).partition("\n")[0],
        )

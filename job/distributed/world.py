"""Where this process stands among those that train together, as their launcher says.

`torchrun` tells it by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR; Kubeflow Trainer tells nodes of
one process each by the PET_ variables that `torchrun` would read.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from job.errors import UsageError

PORT = 29500
"""What `torchrun` takes too where nobody names one."""


@dataclass(frozen=True, kw_only=True)
class World:
    """One of `size` processes, which find each other at `address` and `port`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine: the number of its GPU."""
    address: str = "127.0.0.1"
    port: int = PORT
    served: bool = False
    """Whether the launcher itself keeps the store at the address."""
    attempt: str = "0"
    """Tells one start of the processes from the next under one launcher."""

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def node(self) -> int:
        """The rank of the first process on this machine, whose ranks follow each other."""
        return self.rank - self.local_rank

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def enter(self, environ: MutableMapping[str, str]) -> None:
        """Leaves the place where the libraries look for it; one process alone finds none there."""
        if self.alone:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                environ.pop(name, None)
            return
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )
        environ.setdefault("LOCAL_WORLD_SIZE", "1")
        environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each connection is told of


def of(environ: Mapping[str, str]) -> World:
    """The place that the environment tells.

    Raises UsageError where it tells half of one, or no number.
    """
    if _number(environ, "WORLD_SIZE", 1) > 1:
        return _checked(
            World(
                rank=_number(environ, "RANK"),
                size=_number(environ, "WORLD_SIZE"),
                local_rank=_number(environ, "LOCAL_RANK", 0),
                address=_text(environ, "MASTER_ADDR"),
                port=_number(environ, "MASTER_PORT", PORT),
                served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            )
        )
    processes = environ.get("PET_NPROC_PER_NODE", "1")
    if processes != "1" and "RANK" not in environ:
        raise UsageError(
            "PET_NPROC_PER_NODE",
            "several processes on a node need a launcher",
            value=processes,
            fix="start `torchrun -m job run SPEC`, which reads the same variables",
        )
    if _number(environ, "PET_NNODES", 1) > 1 and "RANK" not in environ:
        return _checked(
            World(
                rank=_number(environ, "PET_NODE_RANK"),
                size=_number(environ, "PET_NNODES"),
                address=_text(environ, "PET_MASTER_ADDR"),
                port=_number(environ, "PET_MASTER_PORT", PORT),
            )
        )
    return World()


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.size:
        raise UsageError(
            "RANK",
            f"must be from 0 to {world.size - 1}, as there are {world.size} processes",
            value=world.rank,
            fix="start the processes by torchrun",
        )
    return world


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UsageError(
            name,
            "is not set, though the job is started as one of several processes",
            fix="start the processes by torchrun, or set it to the host of rank 0",
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environ.get(name):
        return default
    text = _text(environ, name)
    if not text.isdecimal():
        raise UsageError(name, "must be a whole number", value=text, fix="start it by torchrun")
    return int(text)

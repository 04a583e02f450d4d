"""The rank of this process and the size of its world, from its launcher's environment variables.

`torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR. Kubeflow Trainer, with one process per
node, sets the PET_ variables that `torchrun` would read.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from job.errors import UsageError

PORT = 29500
"""The default port, as in `torchrun`."""


@dataclass(frozen=True, kw_only=True)
class World:
    """One of `size` processes, which connect to each other at `address` and `port`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank on this machine: the index of its GPU."""
    address: str = "127.0.0.1"
    port: int = PORT
    launcher_hosts_store: bool = False
    """Whether the launcher hosts the store at the address."""
    attempt: str = "0"
    """The launcher's restart count, which keeps attempts apart in the store."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "World":
        """Raises UsageError if variables are missing or are not numbers."""
        if _number(environ, "WORLD_SIZE", 1) > 1:
            world = cls(
                rank=_number(environ, "RANK"),
                size=_number(environ, "WORLD_SIZE"),
                local_rank=_number(environ, "LOCAL_RANK", 0),
                address=_text(environ, "MASTER_ADDR"),
                port=_number(environ, "MASTER_PORT", PORT),
                launcher_hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            )
        else:
            world = cls._from_kubeflow(environ)
        if not 0 <= world.rank < world.size:
            raise UsageError(
                "RANK",
                f"must be from 0 to {world.size - 1}, as there are {world.size} processes",
                value=world.rank,
                fix="start the processes with torchrun",
            )
        return world

    @classmethod
    def _from_kubeflow(cls, environ: Mapping[str, str]) -> "World":
        processes = environ.get("PET_NPROC_PER_NODE", "1")
        if processes != "1" and "RANK" not in environ:
            raise UsageError(
                "PET_NPROC_PER_NODE",
                "several processes on a node need a launcher",
                value=processes,
                fix="start `torchrun -m job run SPEC`, which reads the same variables",
            )
        if _number(environ, "PET_NNODES", 1) <= 1 or "RANK" in environ:
            return cls()
        return cls(
            rank=_number(environ, "PET_NODE_RANK"),
            size=_number(environ, "PET_NNODES"),
            address=_text(environ, "PET_MASTER_ADDR"),
            port=_number(environ, "PET_MASTER_PORT", PORT),
        )

    @property
    def is_single(self) -> bool:
        return self.size == 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, the only process that writes to the output."""
        return self.rank == 0

    @property
    def node(self) -> int:
        """The rank of this machine's first process, which identifies the machine."""
        return self.rank - self.local_rank

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Sets the variables that libraries read; a single process unsets them."""
        if self.is_single:
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
        environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise every connection is logged


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UsageError(
            name,
            "is not set, though the job is started as one of several processes",
            fix="start the processes with torchrun, or set it to the host of rank 0",
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environ.get(name):
        return default
    text = _text(environ, name)
    if not text.isdecimal():
        raise UsageError(name, "must be a whole number", value=text, fix="start it with torchrun")
    return int(text)

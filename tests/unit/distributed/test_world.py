"""Where a process stands among those that train together, as launchers say it."""

import pytest

from job.distributed.world import World
from job.errors import UsageError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
TRAINER = {
    "PET_NNODES": "4",
    "PET_NPROC_PER_NODE": "1",
    "PET_NODE_RANK": "3",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"PET_NNODES": "1"}])
def test_one_process_is_alone_and_leaves_nothing_for_the_libraries(environ: dict[str, str]) -> None:
    here = World.from_environment(environ)
    assert here.is_single
    assert here.is_rank_zero
    found = {**environ, "LOCAL_RANK": "0"}
    here.export(found)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & found.keys()


def test_torchrun_tells_rank_gpu_node_and_who_keeps_the_store() -> None:
    here = World.from_environment(TORCHRUN)
    assert (here.rank, here.size, here.local_rank, here.node) == (5, 8, 1, 4)
    assert (here.address, here.port, here.launcher_hosts_store, here.attempt) == (
        "node-0",
        29400,
        True,
        "2",
    )
    assert not here.is_rank_zero


def test_kubeflow_trainer_tells_nodes_of_one_process_each() -> None:
    here = World.from_environment(TRAINER)
    assert (here.rank, here.size, here.local_rank, here.node) == (3, 4, 0, 3)
    assert (here.address, here.port, here.launcher_hosts_store) == (
        "job-node-0-0.job",
        29400,
        False,
    )
    found = dict[str, str]()
    here.export(found)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "4", "0")
    assert found["MASTER_ADDR"] == "job-node-0-0.job"


def test_torchrun_within_a_pod_of_the_trainer_is_believed_rather_than_the_pod() -> None:
    assert World.from_environment({**TRAINER, "PET_NPROC_PER_NODE": "2", **TORCHRUN}).rank == 5


@pytest.mark.parametrize(
    ("environ", "field"),
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({**TORCHRUN, "RANK": "8"}, "RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "PET_MASTER_ADDR"),
        ({**TRAINER, "PET_NPROC_PER_NODE": "8"}, "PET_NPROC_PER_NODE"),
    ],
)
def test_half_a_place_is_refused_with_what_is_missing(environ: dict[str, str], field: str) -> None:
    with pytest.raises(UsageError) as refused:
        World.from_environment(environ)
    [problem] = refused.value.problems
    assert problem.field == field
    assert "torchrun" in str(problem.fix)

"""What Kubeflow Trainer looks for in a runtime, and silently ignores if it is missing."""

from collections.abc import Iterator, Sequence

from job.kubernetes.context import Object
from job.kubernetes.trainjob import ANCESTOR
from job.kubernetes.trainjob import NODE as CONTAINER


def the_trainer_finds_its_parts(documents: Sequence[Object]) -> Iterator[str]:
    """A job marked as the trainer's step, its container, and one number of nodes."""
    runtimes = {}
    for document in documents:
        if document["kind"] != "TrainingRuntime":
            continue
        name, spec = document["metadata"]["name"], document["spec"]
        runtimes[name] = spec["mlPolicy"].get("numNodes")
        steps = [
            found["template"]
            for found in spec["template"]["spec"]["replicatedJobs"]
            if found["template"]["metadata"].get("labels", {}).get(ANCESTOR) == "trainer"
        ]
        if not steps:
            yield f"TrainingRuntime/{name}: no job has the label {ANCESTOR}: trainer"
        for step in steps:
            containers = step["spec"]["template"]["spec"]["containers"]
            if CONTAINER not in [container["name"] for container in containers]:
                yield f"TrainingRuntime/{name}: the trainer's job has no container {CONTAINER}"
    for document in documents:
        if document["kind"] == "TrainJob":
            spec = document["spec"]
            nodes, known = spec["trainer"].get("numNodes"), runtimes.get(spec["runtimeRef"]["name"])
            if known is not None and nodes != known:
                yield f"TrainJob: {nodes} nodes, and its runtime says {known}"

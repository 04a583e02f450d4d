"""The job as a TrainJob of Kubeflow Trainer (v2), with a runtime of its own, for several nodes too.

The runtime carries everything that the plain Job has, so that nothing has to be installed in the
cluster but the Trainer. Each pod has one process for its one device, started as everywhere else:
a launcher between would turn every exit code into 1. The processes find each other by the PET_
variables that the Trainer sets.
"""

from job.errors import SpecError
from job.kubernetes import batch, constants, objects, pod
from job.kubernetes.context import Object, Request
from job.kubernetes.rules import trainer

API = "trainer.kubeflow.org/v1alpha1"
NODE = trainer.CONTAINER
"""The name that the Trainer expects of the replicated job, and of its container."""

LONGEST = 63
"""Characters of a pod's name that is a host's name too."""


def bundle(request: Request) -> list[Object]:
    """Everything that `kubectl apply` needs but the Secret and the Trainer.

    Raises SpecError where the job's name makes the names of its pods too long.
    """
    _names_fit(request)
    peers = [{"podSelector": {"matchLabels": request.selector("training")}}]
    return [
        objects.service_account(request),
        objects.config_map(request),
        objects.cache(request),
        objects.network_policy(
            request,
            "training",
            ingress=({"from": peers}, *objects.scraping(request)),
            egress=(
                *objects.STORAGE,
                {"to": peers},
                {"ports": [objects.tcp(constants.TRAINER_PORT)]},
            ),
        ),
        _runtime(request),
        {
            "apiVersion": API,
            "kind": "TrainJob",
            "metadata": request.metadata("training"),
            "spec": {
                "runtimeRef": {
                    "apiGroup": API.partition("/")[0],
                    "kind": "TrainingRuntime",
                    "name": request.name,
                },
                "trainer": {
                    "numNodes": request.nodes,
                    "numProcPerNode": max(1, request.platform.gpus),
                },
            },
        },
    ]


def _names_fit(request: Request) -> None:
    name = request.name
    pod = f"{name}-{NODE}-0-{request.nodes - 1}-abcde"
    if len(pod) > LONGEST:
        raise SpecError(
            "$.name",
            f"is too long for the pods of a TrainJob ({pod})",
            value=name,
            fix=f"use {len(name) - len(pod) + LONGEST} characters at most",
        )


def _runtime(request: Request) -> Object:
    ancestor = {trainer.ANCESTOR: "trainer"}
    # On the pod too: by it the Trainer's own network policy knows whom it hears.
    job = batch.spec(pod.template(request, NODE, ancestor))
    # One that is lost ends all of them, and each counts.
    job["backoffLimit"] *= request.nodes
    # The Trainer keeps and removes what it made by itself.
    del job["ttlSecondsAfterFinished"]
    return {
        "apiVersion": API,
        "kind": "TrainingRuntime",
        "metadata": request.metadata("training"),
        "spec": {
            "mlPolicy": {"numNodes": request.nodes, "torch": {}},
            "template": {
                "spec": {
                    "replicatedJobs": [
                        {
                            "name": NODE,
                            "template": {"metadata": {"labels": ancestor}, "spec": job},
                        }
                    ]
                }
            },
        },
    }

"""The job on several nodes: a TrainJob of Kubeflow Trainer (v2), with a runtime of its own.

The runtime carries everything that the plain Job has, so that nothing has to be installed in the
cluster but the Trainer. Each pod has one process for its one device, started as everywhere else:
a launcher between would turn every exit code into 1. Peers are told by the PET_ variables that
the Trainer sets.
"""

from job.manifests import batch, objects, pod
from job.manifests.request import Object, Request
from job.manifests.rules import trainer

API = "trainer.kubeflow.org/v1alpha1"
NODE = trainer.CONTAINER
"""The name that the Trainer expects of the replicated job, and of its container."""


def bundle(request: Request) -> list[Object]:
    """Everything that `kubectl apply` needs but the Secret and the Trainer."""
    peers = [{"podSelector": {"matchLabels": request.selector("training")}}]
    return [
        objects.service_account(request),
        objects.config_map(request),
        objects.cache(request),
        objects.network_policy(
            request,
            "training",
            ingress=({"from": peers},),
            egress=(*objects.STORAGE, {"to": peers}),
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


def _runtime(request: Request) -> Object:
    template = pod.template(request, containers=[pod.container(request, NODE)])
    job = batch.spec(template)
    # The Trainer keeps and removes what it made by itself.
    del job["ttlSecondsAfterFinished"]
    ancestor = {trainer.ANCESTOR: "trainer"}
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

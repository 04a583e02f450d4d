"""The job as a Kubeflow Trainer (v2) TrainJob with its own TrainingRuntime, on one or more nodes.

The runtime contains everything that the plain Job does, so the cluster needs only the Trainer. Each
pod runs one process for its one device, without a launcher, which would turn every exit code into
1. Processes find each other through the PET_ variables that the Trainer sets.
"""

from job.errors import SpecError
from job.kubernetes import batch, constants, objects, pod
from job.kubernetes.context import Object, RenderContext

API = "trainer.kubeflow.org/v1alpha1"
ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
"""The label by which the Trainer recognizes the training step, and its pods."""
NODE = "node"
"""The replicated job's name, and its container's, as the Trainer expects."""

MAX_HOSTNAME = 63
"""Characters of a pod's name, which is also its hostname."""


def bundle(context: RenderContext) -> list[Object]:
    """Everything to `kubectl apply` except the Secret and the Trainer.

    Raises SpecError if the job's name makes its pods' names too long.
    """
    _check_name(context)
    peers = [{"podSelector": {"matchLabels": context.selector("training")}}]
    return [
        objects.service_account(context),
        objects.config_map(context),
        *objects.cache(context),
        objects.network_policy(
            context,
            "training",
            ingress=({"from": peers}, *objects.scraping(context)),
            egress=(
                objects.outside(context),
                {"to": peers},
                {"ports": [objects.tcp(constants.TRAINER_PORT)]},
            ),
        ),
        _runtime(context),
        {
            "apiVersion": API,
            "kind": "TrainJob",
            "metadata": context.metadata("training"),
            "spec": {
                "runtimeRef": {
                    "apiGroup": API.partition("/")[0],
                    "kind": "TrainingRuntime",
                    "name": context.name,
                },
                "trainer": {
                    "numNodes": context.nodes,
                    "numProcPerNode": max(1, context.platform.gpus),
                },
            },
        },
    ]


def _check_name(context: RenderContext) -> None:
    name = context.name
    pod_name = f"{name}-{NODE}-0-{context.nodes - 1}-abcde"
    if len(pod_name) > MAX_HOSTNAME:
        raise SpecError(
            "$.name",
            f"makes a TrainJob's pod names too long ({pod_name})",
            value=name,
            fix=f"use at most {len(name) - len(pod_name) + MAX_HOSTNAME} characters",
        )


def _runtime(context: RenderContext) -> Object:
    ancestor = {ANCESTOR: "trainer"}
    # On the pods too: the Trainer's own network policy selects them by it.
    job = batch.job_spec(pod.template(context, NODE, ancestor))
    # When one pod fails, all of them end, and each counts.
    job["backoffLimit"] *= context.nodes
    return {
        "apiVersion": API,
        "kind": "TrainingRuntime",
        "metadata": context.metadata("training"),
        "spec": {
            "mlPolicy": {"numNodes": context.nodes, "torch": {}},
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

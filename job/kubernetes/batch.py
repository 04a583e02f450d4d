"""The job on one node: a `batch/v1` Job and what it needs beside it, in the order of creation."""

from collections.abc import Sequence
from typing import Any

from job.kubernetes import constants, objects, pod
from job.kubernetes.context import Object, Request


def bundle(request: Request) -> list[Object]:
    """Everything that `kubectl apply` needs but the Secret."""
    return [
        objects.service_account(request),
        objects.config_map(request),
        objects.cache(request),
        objects.network_policy(request, "training", ingress=objects.scraping(request)),
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": request.metadata("training"),
            "spec": spec(pod.template(request)),
        },
    ]


def spec(template: Object, **more: Any) -> Object:
    """A Job's spec around a pod template, with the policy that matches the exit codes."""
    return {
        "backoffLimit": constants.RETRIES,
        # A new pod starts when the old one has stored its checkpoint and let go of the volume.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": failure_policy(_containers(template)),
        "ttlSecondsAfterFinished": constants.KEEP_SECONDS,
        **more,
        "template": template,
    }


def failure_policy(containers: Sequence[str]) -> Object:
    """Which ends of a pod are tried again.

    A node that goes away and a job that was stopped cost no try. What no try can mend ends the
    job. Everything else counts against `backoffLimit`.
    """
    rules: list[Object] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    ]
    # By name: a sidecar that the cluster adds has exit codes of its own.
    for container in containers:
        rules.append(_on_exit("Ignore", container, constants.RETRIED_FREE))
        rules.append(_on_exit("FailJob", container, constants.NEVER_RETRIED))
    return {"rules": rules}


def _containers(template: Object) -> list[str]:
    """The names of a pod's containers, that of the work first."""
    pod = template["spec"]
    return [found["name"] for found in (*pod["containers"], *pod.get("initContainers", ()))]


def _on_exit(action: str, container: str, codes: tuple[int, ...]) -> Object:
    return {
        "action": action,
        "onExitCodes": {"containerName": container, "operator": "In", "values": list(codes)},
    }

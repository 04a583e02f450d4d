"""The job on one node: a `batch/v1` Job and what it needs beside it, in the order of creation."""

from typing import Any

from job.manifests import objects, pod, values
from job.manifests.request import Object, Request


def bundle(request: Request) -> list[Object]:
    """Everything that `kubectl apply` needs but the Secret."""
    return [
        objects.service_account(request),
        objects.config_map(request),
        objects.cache(request),
        objects.network_policy(request, "training"),
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": request.metadata("training"),
            "spec": spec(pod.template(request)),
        },
    ]


def spec(template: Object, container: str = values.CONTAINER, **more: Any) -> Object:
    """A Job's spec around a pod template, with the policy that matches the exit codes."""
    return {
        "backoffLimit": values.RETRIES,
        # A new pod starts when the old one has stored its checkpoint and let go of the volume.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": failure_policy(container),
        "ttlSecondsAfterFinished": values.KEEP_SECONDS,
        **more,
        "template": template,
    }


def failure_policy(container: str) -> Object:
    """Which ends of a pod are tried again.

    A node that goes away and a job that was stopped cost no try. What no try can mend ends the
    job. Everything else counts against `backoffLimit`.
    """
    return {
        "rules": [
            {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
            _on_exit("Ignore", container, values.RETRIED_FREE),
            _on_exit("FailJob", container, values.NEVER_RETRIED),
        ]
    }


def _on_exit(action: str, container: str, codes: tuple[int, ...]) -> Object:
    return {
        "action": action,
        "onExitCodes": {"containerName": container, "operator": "In", "values": list(codes)},
    }

"""The single-node job: a `batch/v1` Job and the objects it depends on, in order of creation."""

from collections.abc import Sequence
from dataclasses import replace

from job.kubernetes import constants, objects, pod
from job.kubernetes.constants import CACHE
from job.kubernetes.context import Object, RenderContext


def bundle(context: RenderContext) -> list[Object]:
    """Everything to `kubectl apply` except the Secret."""
    return [
        objects.service_account(context),
        objects.config_map(context),
        *objects.cache(context),
        objects.network_policy(context, "training", ingress=objects.scraping(context)),
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": context.metadata("training"),
            "spec": job_spec(pod.template(context)),
        },
    ]


def parity(context: RenderContext) -> list[Object]:
    """A Job that runs `job parity`; its record is a line of its log, and needs no bucket."""
    named = replace(context, spec=replace(context.spec, name="parity"))
    documents = bundle(named)
    for document in documents:
        if document["kind"] == "Job":
            [container] = document["spec"]["template"]["spec"]["containers"]
            container["args"] = ["--log-format=json", "parity", "--to=-", f"--cache-dir={CACHE}"]
    return documents


def job_spec(template: Object) -> Object:
    """A Job's spec around a pod template, with the failure policy that matches the exit codes."""
    return {
        "backoffLimit": constants.RETRIES,
        # Start the new pod only after the old one has saved its checkpoint and released the volume.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": failure_policy(_container_names(template)),
        "template": template,
    }


def failure_policy(containers: Sequence[str]) -> Object:
    """Maps exit codes to retries.

    Node disruptions and stopped jobs do not count against `backoffLimit`; permanent errors fail
    the Job at once; everything else counts.
    """
    rules: list[Object] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    ]
    # By container name: sidecars injected by the cluster have exit codes of their own.
    for container in containers:
        rules.append(_on_exit("Ignore", container, constants.RETRIED_FREE))
        rules.append(_on_exit("FailJob", container, constants.NEVER_RETRIED))
    return {"rules": rules}


def _container_names(template: Object) -> list[str]:
    """The names of a pod's containers, main containers first."""
    spec = template["spec"]
    return [each["name"] for each in (*spec["containers"], *spec.get("initContainers", ()))]


def _on_exit(action: str, container: str, codes: tuple[int, ...]) -> Object:
    return {
        "action": action,
        "onExitCodes": {"containerName": container, "operator": "In", "values": list(codes)},
    }

"""A ResourceQuota that lets the pods of some documents run at the same time, and no more."""

import math
from collections import Counter
from collections.abc import Sequence

from job.kubernetes import pod, resources
from job.kubernetes.context import Object, RenderContext
from job.kubernetes.resources import TIB
from job.planning.sizes import GIB

MILLI = 1000
BOUNDED = ("memory", "ephemeral-storage")
"""Resources whose limits count too; the containers have no limit of CPUs."""


def resource_quota(context: RenderContext, documents: Sequence[Object]) -> Object:
    """The quota for these documents, by summing what their pods and claims ask for."""
    sums: Counter[str] = Counter()
    for document in documents:
        if document["kind"] == "PersistentVolumeClaim":
            sums["persistentvolumeclaims"] += 1
            asked = document["spec"]["resources"]["requests"]["storage"]
            sums["requests.storage"] += _amount("storage", asked)
        for template in pod.templates(document):
            pods = _pods(document, context)
            sums["pods"] += pods
            for name, amount in _pod(template["spec"], documents).items():
                sums[name] += pods * amount
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": context.metadata("training", "-quota"),
        "spec": {"hard": {name: _text(name, sums[name]) for name in sums}},
    }


def _pods(document: Object, context: RenderContext) -> int:
    if document["kind"] == "TrainingRuntime":
        return context.nodes
    replicas: int = document["spec"].get("replicas", 1)
    return replicas


def _pod(spec: Object, documents: Sequence[Object]) -> Counter[str]:
    """What one pod counts for: the larger of each init container and all others together."""
    total: Counter[str] = Counter()
    for container in spec["containers"]:
        total += _container(container)
    for container in spec.get("initContainers", ()):
        total |= _container(container)
    for claim in spec.get("resourceClaims", ()):
        [template] = [
            found
            for found in documents
            if found["kind"] == "ResourceClaimTemplate"
            and found["metadata"]["name"] == claim["resourceClaimTemplateName"]
        ]
        for request in template["spec"]["spec"]["devices"]["requests"]:
            device_class = request["exactly"]["deviceClassName"]
            total[f"{device_class}.deviceclass.resource.k8s.io/devices"] += 1
    return total


def _container(container: Object) -> Counter[str]:
    found = container["resources"]
    amounts = {f"requests.{name}": _amount(name, n) for name, n in found["requests"].items()}
    bounds = {f"limits.{name}": _amount(name, found["limits"][name]) for name in BOUNDED}
    return Counter({**amounts, **bounds})


def _amount(name: str, quantity: str) -> int:
    """A quantity of this package's manifests: bytes, thousandths of a CPU, or devices."""
    if name == "cpu":
        return int(quantity[:-1]) if quantity.endswith("m") else int(quantity) * MILLI
    units = {"Gi": GIB, "Ti": TIB}
    return int(quantity[:-2]) * units[quantity[-2:]] if quantity[-2:] in units else int(quantity)


def _text(name: str, amount: int) -> str:
    if name == "requests.cpu":
        return str(math.ceil(amount / MILLI))
    return resources.quantity(amount) if amount and amount % GIB == 0 else str(amount)

"""How pods ask for devices: a GPU by resource or by claim, and RDMA devices for several nodes."""

import hashlib
import json

from job.kubernetes import pod
from job.kubernetes.context import Object, RenderContext

API = "resource.k8s.io/v1"
"""Stable since Kubernetes 1.34."""
REQUEST = "gpu"
"""The request in a claim, and the claim's name in the pod."""


def asks_for_gpu(container: Object, context: RenderContext) -> bool:
    resource = context.platform.resource
    return resource is not None and resource in container["resources"]["limits"]


def template(context: RenderContext, component: str) -> Object:
    """The template from which each pod of a component gets a claim of its own for one GPU."""
    return {
        "apiVersion": API,
        "kind": "ResourceClaimTemplate",
        "metadata": {**context.metadata(component), "name": _name(context, component)},
        "spec": {
            "spec": {"devices": {"requests": [{"name": REQUEST, "exactly": _device(context)}]}}
        },
    }


def claim_gpu(spec: Object, context: RenderContext, component: str) -> None:
    """Makes a pod claim its GPU instead of asking for the resource, in place."""
    for container in pod.containers(spec):
        if asks_for_gpu(container, context):
            for amounts in _amounts(container):
                amounts.pop(str(context.platform.resource))
            container["resources"]["claims"] = [{"name": REQUEST}]
    claim = {"name": REQUEST, "resourceClaimTemplateName": _name(context, component)}
    spec["resourceClaims"] = [claim]


def add_rdma(spec: Object, context: RenderContext) -> None:
    """Asks for the RDMA devices in every container of a training pod, in place."""
    for container in pod.containers(spec):
        for amounts in _amounts(container):
            amounts.update(context.cluster.rdma_resources)


def _amounts(container: Object) -> tuple[Object, Object]:
    return container["resources"]["requests"], container["resources"]["limits"]


def _device(context: RenderContext) -> Object:
    device: Object = {"deviceClassName": context.cluster.device_class_on(context.platform.name)}
    if expressions := context.cluster.device_selectors:
        device["selectors"] = [{"cel": {"expression": each}} for each in expressions]
    return device


def _name(context: RenderContext, component: str) -> str:
    """Of a template, which cannot be changed: for another device it is another template."""
    digest = hashlib.sha256(json.dumps(_device(context)).encode()).hexdigest()[:8]
    server = "" if component == "training" else "-vllm"
    return f"{context.name}{server}-gpu-{digest}"

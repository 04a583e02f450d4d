"""Fits rendered documents to a cluster: what its options ask of every object and pod."""

from collections.abc import Iterator, Sequence

from job.errors import UsageError
from job.kubernetes import claims, pod
from job.kubernetes.cluster import Cluster, fits
from job.kubernetes.context import Object, RenderContext
from job.kubernetes.platforms import tolerations

CLUSTER_LOCAL = ("localhost", "127.0.0.1", ".svc", ".cluster.local")
"""Never reached through a proxy."""
USERS = ("runAsUser", "runAsGroup", "fsGroup")


def fit(documents: Sequence[Object], context: RenderContext) -> list[Object]:
    """Changes the documents in place; the result also holds the claims that they need.

    Raises UsageError for a variable that the manifest sets itself.
    """
    fitted = []
    for document in documents:
        for template in pod.templates(document):
            component = template["metadata"]["labels"]["app.kubernetes.io/component"]
            if _fit_pod(template, context, component):
                fitted.append(claims.template(context, component))
        if document["kind"] == "Job" and context.cluster.ttl_seconds is not None:
            document["spec"]["ttlSecondsAfterFinished"] = context.cluster.ttl_seconds
        if document["kind"] == "PersistentVolumeClaim" and context.cluster.storage_class:
            document["spec"]["storageClassName"] = context.cluster.storage_class
        fitted.append(document)
    for document in fitted:
        fit_metadata(document["metadata"], context.cluster, namespaced=True)
    return fitted


def fit_metadata(metadata: Object, cluster: Cluster, *, namespaced: bool = False) -> None:
    """Adds the namespace, labels and annotations to an object's metadata, in place."""
    if namespaced and cluster.namespace:
        name = metadata.pop("name")
        rest = dict(metadata)
        metadata.clear()
        metadata.update({"name": name, "namespace": cluster.namespace, **rest})
    if cluster.labels:
        metadata["labels"] = {**metadata.get("labels", {}), **cluster.labels}
    if cluster.annotations:
        metadata["annotations"] = {**metadata.get("annotations", {}), **cluster.annotations}


def _fit_pod(template: Object, context: RenderContext, component: str) -> bool:
    """Changes a pod template in place; returns whether its pods claim a device."""
    cluster, spec = context.cluster, template["spec"]
    fit_metadata(template["metadata"], cluster)
    has_gpu = any(claims.asks_for_gpu(each, context) for each in pod.containers(spec))
    platform = context.platform.name if has_gpu else "cpu"
    if cluster.openshift:
        for key in USERS:
            spec["securityContext"].pop(key, None)
    for container in pod.containers(spec):
        _add_variables(container, context)
    added: Object = {
        "priorityClassName": cluster.priority_class,
        "runtimeClassName": cluster.runtime_class if has_gpu else None,
        "imagePullSecrets": [{"name": name} for name in cluster.pull_secrets],
        "nodeSelector": {k: v for k, v in cluster.node_selector.items() if fits(k, platform)},
        "tolerations": [*spec.get("tolerations", ()), *_tolerations(cluster, has_gpu=has_gpu)],
    }
    spec.update({key: value for key, value in added.items() if value})
    if component == "training" and context.nodes > 1:
        claims.add_rdma(spec, context)
    claiming = has_gpu and cluster.device_class_on(platform) is not None
    if claiming:
        claims.claim_gpu(spec, context, component)
    return claiming


def _tolerations(cluster: Cluster, *, has_gpu: bool) -> Iterator[Object]:
    if cluster.gpu_resource is not None and not has_gpu:  # there may be no other nodes
        yield from tolerations(cluster.gpu_resource)
    for each in cluster.tolerations:
        wanted = {"operator": "Exists"} if each.value is None else {"value": each.value}
        effect = {"effect": each.effect} if each.effect else {}
        yield {"key": each.key, **wanted, **effect}


def _add_variables(container: Object, context: RenderContext) -> None:
    cluster = context.cluster
    # Only containers that read the Secret reach hosts outside the cluster.
    proxies = _proxies(cluster) if "envFrom" in container else {}
    there = {variable["name"] for variable in container.get("env", ())}
    if taken := sorted(there & cluster.env.keys()):
        raise UsageError(
            "--env",
            "is set by the manifest itself",
            value=taken[0],
            fix="leave it out; variables that the spec names take their values from the shell",
        )
    added = {**proxies, **cluster.env}
    if added:
        container["env"] = [
            *container.get("env", ()),
            *({"name": name, "value": pod.literal(value)} for name, value in added.items()),
        ]


def _proxies(cluster: Cluster) -> dict[str, str]:
    if cluster.proxy is None:
        return {}
    direct = ",".join(dict.fromkeys((*CLUSTER_LOCAL, *cluster.no_proxy)))
    return {"HTTP_PROXY": cluster.proxy, "HTTPS_PROXY": cluster.proxy, "NO_PROXY": direct}

"""The objects that a pod uses: ConfigMap, service account, cache volume, network policy."""

from job.kubernetes import constants
from job.kubernetes.context import Object, RenderContext
from job.kubernetes.resources import quantity


def config_map(context: RenderContext) -> Object:
    """The spec, as written."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": context.metadata("training", "-spec"),
        "data": {constants.SPEC_FILE: context.text},
    }


def service_account(
    context: RenderContext, component: str = "training", suffix: str = ""
) -> Object:
    """An account without permissions; workload identity trusts it by name."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": context.metadata(component, suffix),
        "automountServiceAccountToken": False,
    }


def cache(context: RenderContext) -> list[Object]:
    """The volume that caches downloads across retries and runs; nothing if it exists already."""
    volume = context.cache
    if volume.size is None:
        return []
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": volume.claim, "labels": context.labels("training")},
        "spec": {
            "accessModes": ["ReadWriteMany" if volume.is_shared else "ReadWriteOnce"],
            "resources": {"requests": {"storage": quantity(volume.size)}},
        },
    }
    return [claim]


def tcp(port: int) -> Object:
    return {"port": port, "protocol": "TCP"}


def outside(context: RenderContext) -> Object:
    """Egress to the hub and buckets: by port, as their addresses vary.

    Cloud metadata services listen on port 80, so the node's credentials stay out of reach.
    """
    ports = (constants.HTTPS, *constants.STORAGE_PORTS, *context.egress_ports)
    return {"ports": [tcp(port) for port in dict.fromkeys(ports)]}


def monitoring(context: RenderContext) -> Object:
    """Where metrics are read from: Prometheus may run in any namespace, unless one is named."""
    namespace = context.cluster.metrics_from
    labels = {"matchLabels": {"kubernetes.io/metadata.name": namespace}} if namespace else {}
    return {"namespaceSelector": labels}


def scraping(context: RenderContext) -> tuple[Object, ...]:
    """Ingress to the metrics port, if any."""
    port = context.spec.runtime.metrics_port
    return ({"from": [monitoring(context)], "ports": [tcp(port)]},) if port else ()


def network_policy(
    context: RenderContext,
    component: str,
    suffix: str = "",
    *,
    ingress: tuple[Object, ...] = (),
    egress: tuple[Object, ...] | None = None,
) -> Object:
    """Allows a component egress to DNS and `egress`, and ingress from `ingress` only.

    Without `egress`, the component reaches the hub and buckets.
    """
    names = [
        {"port": port, "protocol": protocol}
        for port in constants.DNS_PORTS
        for protocol in ("UDP", "TCP")
    ]
    reached = (outside(context),) if egress is None else egress
    # Servers drop an empty list, and `kubectl diff` would report it for ever.
    incoming = {"ingress": list(ingress)} if ingress else {}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": context.metadata(component, suffix),
        "spec": {
            "podSelector": {"matchLabels": context.selector(component)},
            "policyTypes": ["Ingress", "Egress"],
            **incoming,
            "egress": [{"ports": names}, *reached],
        },
    }

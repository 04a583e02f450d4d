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


STORAGE: tuple[Object, ...] = (
    {"ports": [tcp(port) for port in (constants.HTTPS, *constants.STORAGE_PORTS)]},
)
"""The hub and buckets: by port, as their addresses vary. Cloud metadata services listen on port 80,
so the node's credentials stay out of reach."""


def scraping(context: RenderContext) -> tuple[Object, ...]:
    """Ingress to the metrics port, if any; Prometheus may run in any namespace."""
    port = context.spec.runtime.metrics_port
    return ({"from": [{"namespaceSelector": {}}], "ports": [tcp(port)]},) if port else ()


def network_policy(
    context: RenderContext,
    component: str,
    suffix: str = "",
    *,
    ingress: tuple[Object, ...] = (),
    egress: tuple[Object, ...] = STORAGE,
) -> Object:
    """Allows a component egress to DNS and `egress`, and ingress from `ingress` only."""
    names = [{"port": constants.DNS_PORT, "protocol": protocol} for protocol in ("UDP", "TCP")]
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
            "egress": [{"ports": names}, *egress],
        },
    }

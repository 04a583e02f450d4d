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


def cache(context: RenderContext) -> Object:
    """The volume that caches downloads across retries and runs."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": context.cache_claim, "labels": context.labels("training")},
        "spec": {
            "accessModes": ["ReadWriteOnce" if context.nodes == 1 else "ReadWriteMany"],
            "resources": {"requests": {"storage": quantity(context.needs.cache)}},
        },
    }


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
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": context.metadata(component, suffix),
        "spec": {
            "podSelector": {"matchLabels": context.selector(component)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": list(ingress),
            "egress": [{"ports": names}, *egress],
        },
    }

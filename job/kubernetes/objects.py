"""What stands around a job: its spec, its account, its cache, and whom it may speak to."""

from job.kubernetes import constants
from job.kubernetes.context import Object, Request
from job.kubernetes.resources import quantity


def config_map(request: Request) -> Object:
    """The spec, as its author wrote it."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": request.metadata("training", "-spec"),
        "data": {constants.SPEC_FILE: request.text},
    }


def service_account(request: Request, component: str = "training", suffix: str = "") -> Object:
    """An account of its own, without rights; workload identity trusts it by name."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": request.metadata(component, suffix),
        "automountServiceAccountToken": False,
    }


def cache(request: Request) -> Object:
    """The volume that keeps downloads between tries and runs."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": request.cache_claim, "labels": request.labels("training")},
        "spec": {
            "accessModes": ["ReadWriteOnce" if request.nodes == 1 else "ReadWriteMany"],
            "resources": {"requests": {"storage": quantity(request.needs.cache)}},
        },
    }


def tcp(port: int) -> Object:
    return {"port": port, "protocol": "TCP"}


STORAGE: tuple[Object, ...] = (
    {"ports": [tcp(port) for port in (constants.HTTPS, *constants.STORAGE_PORTS)]},
)
"""The hub and buckets. Ports count and not addresses, which change with every hub and bucket. The
metadata service of clouds is on port 80, so a node's own credentials are out of reach."""


def scraping(request: Request) -> tuple[Object, ...]:
    """Opens the port for metrics, if there is one: Prometheus may run in any namespace."""
    port = request.spec.runtime.metrics_port
    return ({"from": [{"namespaceSelector": {}}], "ports": [tcp(port)]},) if port else ()


def network_policy(
    request: Request,
    component: str,
    suffix: str = "",
    *,
    ingress: tuple[Object, ...] = (),
    egress: tuple[Object, ...] = STORAGE,
) -> Object:
    """Lets a part of the job look up names and reach `egress`; `ingress` alone reaches it."""
    names = [{"port": constants.DNS_PORT, "protocol": protocol} for protocol in ("UDP", "TCP")]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": request.metadata(component, suffix),
        "spec": {
            "podSelector": {"matchLabels": request.selector(component)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": list(ingress),
            "egress": [{"ports": names}, *egress],
        },
    }

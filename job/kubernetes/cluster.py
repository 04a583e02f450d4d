"""What one cluster asks of every manifest; `job manifest --help` describes each option."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from job.errors import UsageError

Weights = Literal["node", "claim", "shared"]
WEIGHTS: tuple[Weights, ...] = ("node", "claim", "shared")
"""Where a server keeps its weights: on the node's disk, on a claim of its own, or on a claim that
pods on several nodes mount."""

VENDORS: Mapping[str, str] = {"amd": "amd.com", "nvidia": "nvidia.com"}
"""The domain of each GPU platform's resources, node labels and device classes."""


@dataclass(frozen=True, kw_only=True)
class Toleration:
    key: str
    value: str | None = None
    """None tolerates any value."""
    effect: str | None = None
    """None tolerates any effect."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The validated options; the defaults fit a plain cluster."""

    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels in a GPU vendor's domain concern only the pods that ask for such a GPU."""
    tolerations: tuple[Toleration, ...] = ()
    priority_class: str | None = None
    runtime_class: str | None = None
    """Of the pods that ask for a GPU."""
    pull_secrets: tuple[str, ...] = ()
    storage_class: str | None = None
    gpu_resource: str | None = None
    """Replaces the platform's resource, such as `amd.com/gpu`."""
    device_class: str | None = None
    """Claims the GPU by dynamic resource allocation from this class, not by a resource."""
    device_selectors: tuple[str, ...] = ()
    """CEL expressions that the claimed device satisfies."""
    rdma_resources: Mapping[str, str] = field(default_factory=dict)
    """Count by resource, for every pod of a training on several nodes."""
    env: Mapping[str, str] = field(default_factory=dict)
    proxy: str | None = None
    no_proxy: tuple[str, ...] = ()
    egress_ports: tuple[int, ...] = ()
    """Opened in addition to those of the hub and of storage."""
    metrics_from: str | None = None
    """The only namespace that may read the metrics; None lets all read the job's."""
    ttl_seconds: int | None = None
    openshift: bool = False
    """Leaves users and groups to the namespace's range."""
    weights: Weights = "node"

    def resource_on(self, platform: str, default: str | None) -> str | None:
        """The GPU resource of a platform; that of one vendor is not asked of the other's nodes."""
        if default is None or self.gpu_resource is None:
            return default
        return self.gpu_resource if fits(self.gpu_resource, platform) else default

    def device_class_on(self, platform: str) -> str | None:
        if self.device_class is None or not fits(self.device_class, platform):
            return None
        return self.device_class


def fits(name: str, platform: str) -> bool:
    """Whether a resource, label or device class may be found on a platform's nodes."""
    domain = name.partition("/")[0]
    owner = next((known for known in VENDORS.values() if is_within(domain, known)), None)
    return owner is None or owner == VENDORS.get(platform)


def is_within(domain: str, parent: str) -> bool:
    return domain == parent or domain.endswith(f".{parent}")


def refuse_other_vendors(cluster: Cluster, platform: str) -> None:
    """Raises UsageError for a GPU of the vendor that the platform is not."""
    if platform not in VENDORS:
        return
    for option, name in (
        ("--gpu-resource", cluster.gpu_resource),
        ("--device-class", cluster.device_class),
    ):
        if name is not None and not fits(name, platform):
            other = next(each for each in VENDORS if each != platform)
            raise UsageError(
                option,
                f"is not found on nodes of --platform {platform}",
                value=name,
                fix=f"--platform {other}, or a name of {VENDORS[platform]}",
            )

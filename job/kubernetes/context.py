"""The input to rendering: a spec, its resource requirements, and the target platform."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from job import __version__
from job.families import Family
from job.kubernetes import constants
from job.kubernetes.cache_volume import CacheVolume
from job.kubernetes.cluster import Cluster
from job.kubernetes.platforms import Platform
from job.planning.requirements import Needs
from job.spec import hub_output
from job.spec.types import JobSpec

Object = dict[str, Any]
"""A Kubernetes object, as in YAML."""


@dataclass(frozen=True, kw_only=True)
class RenderContext:
    spec: JobSpec
    text: str = field(repr=False)
    """The text of the spec, which is deployed with its comments and variables."""
    platform: Platform
    needs: Needs
    family: type[Family]
    cluster: Cluster
    registry: str
    job_image: str | None
    """Replaces the image that `make image` pushes to the registry unless None."""
    cache: CacheVolume
    nodes: int
    sets: tuple[str, ...]
    """Overrides, as given to `--set`."""
    output: str | None
    """Replaces `output.uri` unless None."""
    environ: Mapping[str, str]
    """Values of the environment variables that the spec uses, except secrets."""
    secrets: Mapping[str, str] = field(repr=False)
    """Values of the secret variables. Pods read them from a Secret; no manifest contains them."""
    egress_ports: tuple[int, ...] = ()
    """Ports of hosts outside the pod's network policy, beside those in `constants`."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def image(self) -> str:
        return self.job_image or constants.image(self.registry, self.platform.accelerator)

    @property
    def output_uri(self) -> str:
        """A local one for a run whose output is on the hub: its state is in a pod's cache."""
        if hub_output.is_output_of(self.spec):
            return self.spec.output.uri
        return self.output or self.spec.output.uri

    def metadata(self, component: str, suffix: str = "") -> Object:
        return {"name": self.name + suffix, "labels": self.labels(component)}

    def labels(self, component: str) -> dict[str, str]:
        """Kubernetes' recommended labels for one component of this job."""
        return {
            **self.selector(component),
            "app.kubernetes.io/version": __version__,
            "app.kubernetes.io/part-of": constants.NAME,
            "app.kubernetes.io/managed-by": constants.NAME,
        }

    def selector(self, component: str) -> dict[str, str]:
        """The labels that identify the component."""
        return {
            "app.kubernetes.io/name": constants.NAME,
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/component": component,
        }

"""What a manifest is made from: a spec, as written and as measured, and where it shall run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from job import __version__
from job.families import Family
from job.kubernetes import constants
from job.kubernetes.platforms import Platform
from job.planning.requirements import Needs
from job.spec.types import JobSpec

Object = dict[str, Any]
"""A Kubernetes object, as YAML would say it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    spec: JobSpec
    text: str = field(repr=False)
    """The spec as its author wrote it: it reaches the cluster with its comments and variables."""
    platform: Platform
    needs: Needs
    family: type[Family]
    registry: str
    nodes: int
    sets: tuple[str, ...]
    """Overrides, as `--set` takes them."""
    output: str | None
    """What replaces `output.uri`, if anything does."""
    environ: Mapping[str, str]
    """The variables that the spec names, secrets aside, with their values."""
    secrets: Mapping[str, str] = field(repr=False)
    """The others: the job is given them by a Secret, and no manifest may show them."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def image(self) -> str:
        return constants.image(self.registry, self.platform.accelerator)

    @property
    def cache_claim(self) -> str:
        """The claim for the cache's volume: its access modes can never change, so two names."""
        return f"{self.name}-cache" if self.nodes == 1 else f"{self.name}-cache-shared"

    @property
    def output_uri(self) -> str:
        return self.output or self.spec.output.uri

    def metadata(self, component: str, suffix: str = "") -> Object:
        return {"name": self.name + suffix, "labels": self.labels(component)}

    def labels(self, component: str) -> dict[str, str]:
        """The labels that Kubernetes recommends, for one part of this job."""
        return {
            **self.selector(component),
            "app.kubernetes.io/version": __version__,
            "app.kubernetes.io/part-of": constants.NAME,
            "app.kubernetes.io/managed-by": constants.NAME,
        }

    def selector(self, component: str) -> dict[str, str]:
        """The labels that tell this part from every other."""
        return {
            "app.kubernetes.io/name": constants.NAME,
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/component": component,
        }

"""The pod templates in a manifest, with their owners."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from job.kubernetes.context import Object


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod template and its owner."""

    owner: str
    """Kind and name of the owner, for messages."""
    kind: str
    job: Object
    """The spec around the template."""
    labels: dict[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(documents: Sequence[Object]) -> Iterator[Pod]:
    """The pod templates of all Jobs, Deployments and training runtimes."""
    for document in documents:
        for kind, job in _owners(document):
            template = job["template"]
            yield Pod(
                owner=f"{document['kind']}/{document['metadata']['name']}",
                kind=kind,
                job=job,
                labels=template["metadata"]["labels"],
                spec=template["spec"],
            )


def _owners(document: Object) -> Iterator[tuple[str, Any]]:
    if document["kind"] in ("Job", "Deployment"):
        yield document["kind"], document["spec"]
    elif document["kind"] == "TrainingRuntime":
        for replicated in document["spec"]["template"]["spec"]["replicatedJobs"]:
            yield "Job", replicated["template"]["spec"]

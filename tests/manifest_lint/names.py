"""Names, labels and images."""

import re
from collections.abc import Iterator, Sequence

from job.kubernetes.context import Object
from tests.manifest_lint.pods import Pod

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LONG_NAMES = ("ConfigMap", "PersistentVolumeClaim", "ResourceClaimTemplate")
"""Kinds whose names end up in no label and no host name."""
PORT = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
IMAGE = re.compile(r"\S+/\S+(:(?P<tag>[\w][\w.-]{0,127})|@sha256:[0-9a-f]{64})")


def names_are_legal(documents: Sequence[Object]) -> Iterator[str]:
    seen = set()
    for document in documents:
        name = document["metadata"]["name"]
        where = f"{document['kind']}/{name}"
        allowed = DNS_SUBDOMAIN if document["kind"] in LONG_NAMES else DNS_LABEL
        if not allowed.fullmatch(name):
            yield f"{where}: the name must be 1 to 63 lower-case letters, digits and hyphens"
        if document["kind"] == "Service" and not DNS_1035.fullmatch(name):
            yield f"{where}: the name of a Service must begin with a letter"
        if where in seen:
            yield f"{where}: appears twice"
        seen.add(where)
        for key, value in document["metadata"].get("labels", {}).items():
            if not isinstance(value, str) or not LABEL.fullmatch(value):
                yield f"{where}: label {key} has the value {value!r}, which labels cannot have"


def images_are_pinned(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        found = IMAGE.fullmatch(container["image"])
        if found is None or found["tag"] == "latest":
            yield f"image {container['image']} needs a registry, and a tag other than latest"


def names_in_a_pod_are_legal(pod: Pod) -> Iterator[str]:
    for what, found in (("container", pod.containers), ("volume", pod.spec.get("volumes", []))):
        names = [each["name"] for each in found]
        for name in names:
            if not DNS_LABEL.fullmatch(name):
                yield f"{what} {name}: the name must be lower-case letters, digits and hyphens"
        if len(names) != len(set(names)):
            yield f"two of its {what}s have one name: {names}"
    for container in pod.containers:
        variables = [variable["name"] for variable in container.get("env", [])]
        if len(variables) != len(set(variables)):
            yield f"container {container['name']} has a variable twice: {variables}"
        for port in container.get("ports", []):
            if not PORT.fullmatch(port["name"]):
                yield f"port {port['name']}: the name must be 1 to 15 lower-case letters or digits"

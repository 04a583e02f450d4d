"""Resource quantities, requests and limits."""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

from job.kubernetes.context import Object
from tests.manifest_lint.pods import Pod

QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
FACTORS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTP", 1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTP", 1)},
}


def value(quantity: object) -> Decimal:
    """A quantity's numeric value. Raises ValueError if Kubernetes would not accept it."""
    found = QUANTITY.fullmatch(str(quantity))
    if found is None:
        raise ValueError(f"{quantity!r} is no quantity")
    return Decimal(found[1]) * FACTORS[found[2] or ""]


def quantities_are_sound(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        found = container.get("resources", {})
        requests, limits = found.get("requests", {}), found.get("limits", {})
        try:
            amounts = {name: value(amount) for name, amount in requests.items()}
            bounds = {name: value(amount) for name, amount in limits.items()}
        except ValueError as error:
            yield f"container {container['name']}: {error}"
            continue
        for name in ("memory", "ephemeral-storage"):
            if name not in amounts or name not in bounds:
                yield f"container {container['name']}: {name} needs a request and a limit"
        for name, bound in bounds.items():
            device = "/" in name
            if device and (bound != bound.to_integral() or amounts.get(name) != bound):
                yield f"container {container['name']}: {name} must be whole, in both alike"
            elif amounts.get(name, bound) > bound:
                yield f"container {container['name']}: requests more {name} than its limit"
        for name in amounts:
            # Nodes with network devices have no taint for them.
            if (
                "/" in name
                and not name.startswith("rdma/")
                and not any(
                    toleration.get("key") == name for toleration in pod.spec.get("tolerations", [])
                )
            ):
                yield f"asks for {name} and does not tolerate the taint of such nodes"


def shared_memory_fits(pod: Pod) -> Iterator[str]:
    """Memory-backed volumes count against the pod's memory limit."""
    shared = Decimal(0)
    for volume in pod.spec.get("volumes", []):
        directory = volume.get("emptyDir", {})
        if directory.get("medium") == "Memory":
            if "sizeLimit" not in directory:
                yield f"volume {volume['name']} is memory without an end: it needs a sizeLimit"
                continue
            shared += value(directory["sizeLimit"])
    limits = [
        container["resources"]["limits"].get("memory", 0) for container in pod.spec["containers"]
    ]
    memory = sum(value(limit) for limit in limits if QUANTITY.fullmatch(str(limit)))
    if shared >= memory:
        yield "its volumes in memory are larger than its memory"


def claims_ask_for_a_disk(documents: Sequence[Object]) -> Iterator[str]:
    for document in documents:
        if document["kind"] != "PersistentVolumeClaim":
            continue
        where, spec = f"PersistentVolumeClaim/{document['metadata']['name']}", document["spec"]
        if not spec.get("accessModes"):
            yield f"{where}: accessModes must name one"
        try:
            if not value(spec["resources"]["requests"]["storage"]):
                yield f"{where}: asks for no storage"
        except (KeyError, ValueError) as error:
            yield f"{where}: needs a request for storage: {error}"

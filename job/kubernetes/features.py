"""What a cluster may add to a job, whatever its platform: a queue, and ways to reach a bucket."""

import copy
from collections.abc import Callable, Sequence

from job.kubernetes import constants
from job.kubernetes.context import Object

QUEUE = "finetune"
"""The LocalQueue of Kueue that the reader makes."""
ROLE = "arn:aws:iam::111122223333:role/finetune-job"
"""Stands for the reader's own role; the account is the one of AWS's documentation."""
TOKENS = "/var/run/secrets/finetune"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OTHERS = (
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "HF_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
)
"""What the Secret may hold beside them."""

Feature = Callable[[Object], None]
"""Changes a Job or a Deployment in place."""


def kueue(document: Object) -> None:
    """Kueue admits the job when its queue has room, and takes it back by suspending it."""
    if document["kind"] == "Job":
        document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = QUEUE
        document["spec"]["suspend"] = True


def s3_static_keys(document: Object) -> None:
    """The keys must be there; without them the pod waits and says which is missing."""
    for container in _readers(document):
        container["env"] = [*container.get("env", []), *(_from_secret(key) for key in KEYS)]


def s3_workload_identity(document: Object) -> None:
    """A role in place of keys: a short-lived token that only this pod is given.

    Whole Secrets are no longer read: keys among them would come before the role.
    """
    for container in _readers(document):
        del container["envFrom"]
        container["env"] = [
            *container.get("env", []),
            {"name": "AWS_ROLE_ARN", "value": ROLE},
            {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": f"{TOKENS}/token"},
            *(_from_secret(key, optional=True) for key in OTHERS),
        ]
        mount = {"name": "identity", "mountPath": TOKENS, "readOnly": True}
        container["volumeMounts"].append(mount)
    token = {"audience": "sts.amazonaws.com", "expirationSeconds": 3600, "path": "token"}
    document["spec"]["template"]["spec"]["volumes"].append(
        {"name": "identity", "projected": {"sources": [{"serviceAccountToken": token}]}}
    )


def _readers(document: Object) -> list[Object]:
    """The containers that are given the Secret, which are those that speak to storage."""
    spec = document["spec"]["template"]["spec"]
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    return [container for container in containers if "envFrom" in container]


FEATURES: dict[str, Feature] = {
    "kueue": kueue,
    "s3-static-keys": s3_static_keys,
    "s3-workload-identity": s3_workload_identity,
}


def apply(feature: Feature, documents: Sequence[Object]) -> list[Object]:
    """The documents with the feature in those of them that run the job's image."""
    found = copy.deepcopy(list(documents))
    for document in found:
        if document["kind"] in ("Job", "Deployment"):
            feature(document)
    return found


def _from_secret(key: str, *, optional: bool = False) -> Object:
    reference: Object = {"name": constants.SECRET, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}

"""Optional cluster features for any platform: a Kueue queue, and ways to authenticate to S3."""

import copy
from collections.abc import Callable, Sequence

from job.kubernetes import constants, pod
from job.kubernetes.context import Object

QUEUE = "finetune"
"""Kueue's LocalQueue, created by the user."""
ROLE = "arn:aws:iam::111122223333:role/finetune-job"
"""Placeholder for the user's role; the account is the one in AWS's documentation."""
TOKENS = "/var/run/secrets/finetune"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OPTIONAL_KEYS = (
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
)
"""Other entries that the Secret may have."""

WORKLOADS = ("Job", "Deployment", "TrainingRuntime", "TrainJob")
Feature = Callable[[Object, Sequence[str]], None]
"""Modifies one of these in place; takes the names of the secret variables that the spec uses."""


def kueue(document: Object, _: Sequence[str]) -> None:
    """Kueue admits the job when its queue has quota, and preempts it by suspending it.

    `suspend` is Kueue's alone, which sets it when the job is created: in a manifest it would
    suspend a running job, and kill its pods, each time that the manifest is applied.
    """
    if document["kind"] in ("Job", "TrainJob"):
        document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = QUEUE


def s3_static_keys(document: Object, _: Sequence[str]) -> None:
    """Requires the keys: without them the pod stays pending and names the missing one."""
    for container in _with_secret(document):
        container["env"] = [*container.get("env", []), *(_from_secret(key) for key in KEYS)]


def s3_workload_identity(document: Object, secrets: Sequence[str]) -> None:
    """An IAM role instead of keys: a short-lived token for this pod only.

    Replaces `envFrom`: static keys in the Secret would take precedence over the role.
    """
    for container in _with_secret(document):
        del container["envFrom"]
        env = container.get("env", [])
        # Servers take each name once; a variable of the container wins over the Secret's.
        there = {*KEYS, *(variable["name"] for variable in env)}
        optional = dict.fromkeys((*OPTIONAL_KEYS, *secrets))
        container["env"] = [
            *env,
            {"name": "AWS_ROLE_ARN", "value": ROLE},
            {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": f"{TOKENS}/token"},
            *(_from_secret(key, optional=True) for key in optional if key not in there),
        ]
        mount = {"name": "identity", "mountPath": TOKENS, "readOnly": True}
        container["volumeMounts"].append(mount)
    token = {"audience": "sts.amazonaws.com", "expirationSeconds": 3600, "path": "token"}
    for template in pod.templates(document):
        template["spec"]["volumes"].append(
            {"name": "identity", "projected": {"sources": [{"serviceAccountToken": token}]}}
        )


def _with_secret(document: Object) -> list[Object]:
    """The containers that read the Secret: those that access storage."""
    return [
        container
        for template in pod.templates(document)
        for container in pod.containers(template["spec"])
        if "envFrom" in container
    ]


FEATURES: dict[str, Feature] = {
    "kueue": kueue,
    "s3-static-keys": s3_static_keys,
    "s3-workload-identity": s3_workload_identity,
}


def apply(
    feature: Feature, documents: Sequence[Object], secrets: Sequence[str] = ()
) -> list[Object]:
    """A copy of the documents with the feature applied to everything that runs pods."""
    changed = copy.deepcopy(list(documents))
    for document in changed:
        if document["kind"] in WORKLOADS:
            feature(document, secrets)
    return changed


def _from_secret(key: str, *, optional: bool = False) -> Object:
    reference: Object = {"name": constants.SECRET, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}

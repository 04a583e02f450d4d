"""Values that manifests, images and docs share."""

from job import __version__, errors

NAME = "finetune-job"
"""The application's name; a job's own name comes from its spec."""

UID = 10001
"""The user and group of the image (`containers/*.Containerfile`)."""

CONTAINER = "job"
"""The container that runs the training job."""

DOCTOR = "doctor"
"""The init container that checks the node, credentials and storage before training starts."""

CACHE, WORK, TMP, SHM = "/cache", "/work", "/tmp", "/dev/shm"  # noqa: S108 - mounts, not files
"""Writable paths; the rest of the file system is read-only."""
SPEC_DIR, SPEC_FILE = "/etc/finetune", "spec.yaml"
WEIGHTS = "/weights"
"""Where the server's weights are mounted."""

SECRET = "finetune-credentials"  # noqa: S105 - its name
"""The user's Secret; its entries become environment variables: HF_TOKEN, AWS_REGION, keys."""

REGISTRY = "registry.example.com"
"""Placeholder for the user's registry."""

VIDEO_GROUP = 44
RENDER_GROUPS = (106, 109, 110, 992, 993)
"""Groups that may own /dev/kfd and /dev/dri: `video` is 44 on Debian and Ubuntu, but `render`
differs by release (Debian 106, Ubuntu 20.04 and 22.04 109 and 110, Ubuntu 24.04 992 and 993). No
host files are mounted, so a group that means something else on a node grants nothing."""

RETRIES = 3
"""How often transient failures are retried."""

NEVER_RETRIED = tuple(errors.exit_codes("never"))
RETRIED_FREE = tuple(errors.exit_codes("free"))

HTTPS, STORAGE_PORTS = 443, (9000, 8333)
"""The hub and S3, and in-cluster MinIO and SeaweedFS: network policies see the pods' ports, not the
Service's."""
DNS_PORTS = (53, 5353)
"""The second is where OpenShift's DNS pods listen."""
VLLM_PORT = 8000
TRAINER_PORT = 10443
"""Where Kubeflow Trainer receives a TrainJob's status."""

OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.31", "1.37"
"""Pod failure policies are stable since 1.31; 1.37 is the newest that kubernetes-validate knows."""


def image(registry: str, accelerator: str) -> str:
    """The image that `make image` builds for an accelerator, in a registry."""
    return f"{registry}/{NAME}:{__version__}-{accelerator}"

"""Values that several manifests, the images and the documents must agree on: each has one home."""

from job import __version__, errors

NAME = "finetune-job"
"""Of the application; a job's own name is its spec's."""

UID = 10001
"""The user and group of the image (`containers/*.Containerfile`)."""

CONTAINER = "job"
"""The container that runs the job."""

DOCTOR = "doctor"
"""The init container that looks at the node, the accounts and the storage before the job starts."""

CACHE, WORK, TMP, SHM = "/cache", "/work", "/tmp", "/dev/shm"  # noqa: S108 - mounts, not files
"""What a container may write to; everything else is read only."""
SPEC_DIR, SPEC_FILE = "/etc/finetune", "spec.yaml"
WEIGHTS = "/weights"
"""Where a server finds the weights that it serves."""

SECRET = "finetune-credentials"  # noqa: S105 - its name
"""Made by the reader; what it holds becomes the environment: HF_TOKEN, AWS_REGION, keys."""

REGISTRY = "registry.example.com"
"""Stands for the reader's own registry."""

VIDEO_GROUP = 44
RENDER_GROUPS = (106, 109, 110, 992, 993)
"""Groups that may own /dev/kfd and /dev/dri: `video` is 44 on Debian and Ubuntu, but `render` has
another number on each release (106 Debian, 109 and 110 Ubuntu 20.04 and 22.04, 992 and 993 Ubuntu
24.04). No host file is mounted, so a number that means something else on a node opens nothing."""

RETRIES = 3
"""Failures that may pass by themselves are tried again this often."""
KEEP_SECONDS = 3 * 24 * 3600
"""A finished job stays this long, so that one from a Friday is there on Monday."""

NEVER_RETRIED = tuple(errors.exit_codes("never"))
RETRIED_FREE = tuple(errors.exit_codes("free"))

HTTPS, STORAGE_PORTS = 443, (9000, 8333)
"""The hub and S3; and MinIO and SeaweedFS in the cluster, whose ports policies see behind the
service's own."""
DNS_PORT, VLLM_PORT = 53, 8000
TRAINER_PORT = 10443
"""Where Kubeflow Trainer takes the status of a TrainJob."""

OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.31", "1.37"
"""Pod failure policies are stable since 1.31; 1.37 is the newest that the checks know."""


def image(registry: str, accelerator: str) -> str:
    """The image that `make image` builds for an accelerator, at a registry."""
    return f"{registry}/{NAME}:{__version__}-{accelerator}"

"""The Pod Security Standard `restricted`, and a read-only root file system."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from tests.manifest_lint.pods import Pod

ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
CACHES = ("HOME", "_HOME", "_CACHE", "_CACHE_DIR", "_CACHE_ROOT")
"""Suffixes of environment variables that name a writable directory."""


def is_restricted(pod: Pod) -> Iterator[str]:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    whole = pod.spec.get("securityContext", {})
    if whole.get("runAsNonRoot") is not True or whole.get("runAsUser") == 0:
        yield "must run as a user other than root"
    if whole.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "needs a seccompProfile"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"{key} is not allowed"
    for volume in pod.spec.get("volumes", []):
        if kinds := set(volume) - {"name"} - ALLOWED_VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not allowed: {sorted(kinds)}"
    for container in pod.containers:
        own = container.get("securityContext", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            yield f"container {container['name']} may gain privileges"
        if own.get("runAsNonRoot") is False or own.get("runAsUser") == 0:
            yield f"container {container['name']} must run as a user other than root"
        if own.get("seccompProfile", {}).get("type") == "Unconfined":
            yield f"container {container['name']} has no seccompProfile"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"container {container['name']} takes a port of its node"
        if set(own.get("capabilities", {}).get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"container {container['name']} adds capabilities"
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"container {container['name']} keeps capabilities"
        if own.get("readOnlyRootFilesystem") is not True:
            yield f"container {container['name']} may write to its image"


def caches_can_be_written(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        writable = [
            PurePosixPath(mount["mountPath"])
            for mount in container.get("volumeMounts", [])
            if not mount.get("readOnly")
        ]
        for variable in container.get("env", []):
            if variable["name"].endswith(CACHES) and "value" in variable:
                path = PurePosixPath(variable["value"])
                if not any(path.is_relative_to(mount) for mount in writable):
                    yield f"{variable['name']} is {path}, where nothing can be written"

"""The pod that runs the job: what it may do, what it may write, what it is told."""

import re
from collections.abc import Mapping

from job import signals
from job.kubernetes import constants
from job.kubernetes.context import Object, Request
from job.kubernetes.resources import quantity

CONFIG = "spec"
_DOLLARS = re.compile(r"\${2,}|\$(?=\()")
MOUNTS = {
    "cache": constants.CACHE,
    "work": constants.WORK,
    "tmp": constants.TMP,
    "shm": constants.SHM,
}


def template(
    request: Request, name: str = constants.CONTAINER, labels: Mapping[str, str] | None = None
) -> Object:
    """The pod template of the job, whose container is called `name`."""
    needs = request.needs
    spec: Object = {
        "restartPolicy": "Never",
        "serviceAccountName": request.name,
        # The job never speaks to the API server.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": needs.grace_seconds,
        "securityContext": pod_security(request.platform.groups),
        "tolerations": request.platform.tolerations,
        # On the node and with the accounts of the job; a device that it is given, the job is given.
        "initContainers": [container(request, constants.DOCTOR, command="doctor")],
        "containers": [{**container(request, name), **_metrics(request)}],
        "volumes": [
            {"name": CONFIG, "configMap": {"name": f"{request.name}-spec"}},
            {"name": "cache", "persistentVolumeClaim": {"claimName": request.cache_claim}},
            scratch("work", needs.work),
            scratch("tmp", needs.tmp),
            memory("shm", needs.shared_memory),
        ],
    }
    return {
        "metadata": {"labels": {**request.labels("training"), **(labels or {})}},
        "spec": {key: value for key, value in spec.items() if value != []},
    }


def container(request: Request, name: str = constants.CONTAINER, command: str = "run") -> Object:
    """A container that runs the whole job, or another command with its spec."""
    found: Object = {
        "name": name,
        "image": request.image,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments(request, command),
        "env": [
            {"name": key, "value": literal(value)}
            for key, value in sorted(_environ(request).items())
        ],
        "envFrom": [{"secretRef": {"name": constants.SECRET, "optional": True}}],
        "resources": _resources(request),
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": CONFIG, "mountPath": constants.SPEC_DIR, "readOnly": True},
            *({"name": name, "mountPath": path} for name, path in MOUNTS.items()),
        ],
    }
    return {key: value for key, value in found.items() if value != []}


def _environ(request: Request) -> dict[str, str]:
    # Else the job would warn of checkpoints that take longer than Kubernetes' own 30 seconds.
    return {**request.environ, signals.GRACE_VARIABLE: str(request.needs.grace_seconds)}


def arguments(request: Request, command: str) -> list[str]:
    """What the image's entrypoint is given."""
    settings = {
        # A pod without its device must fail, not train for weeks on the CPU.
        "runtime.accelerator": request.platform.accelerator,
        "runtime.cache_dir": constants.CACHE,
        "runtime.workdir": constants.WORK,
    }
    sets = (*request.sets, *(f"{key}={value}" for key, value in settings.items()))
    found = ["--log-format=json", command, f"{constants.SPEC_DIR}/{constants.SPEC_FILE}"]
    found += [f"--set={item}" for item in sets]
    if request.output:
        found.append(f"--output={request.output}")
    return [literal(each) for each in found]


def literal(text: str) -> str:
    """`text` as an argument or variable that Kubernetes hands on as it is.

    It puts variables in the place of `$(NAME)` there, and makes `$$` one `$`: LaTeX has both.
    """
    return _DOLLARS.sub(lambda found: 2 * found[0], text)


def pod_security(groups: tuple[int, ...] = ()) -> Object:
    """What the Pod Security Standard `restricted` asks of a pod."""
    found: Object = {
        "runAsNonRoot": True,
        "runAsUser": constants.UID,
        "runAsGroup": constants.UID,
        "fsGroup": constants.UID,
        # Without this every start would walk through all files of the cache.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {**found, "supplementalGroups": list(groups)} if groups else found


def container_security() -> Object:
    """What `restricted` asks of a container, and a root file system that nobody writes to."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def scratch(name: str, size: int) -> Object:
    """A folder on the node that goes with the pod."""
    return {"name": name, "emptyDir": {"sizeLimit": quantity(size)}}


def memory(name: str, size: int) -> Object:
    """A folder in memory; without one /dev/shm holds 64 MB, too little for data loaders."""
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": quantity(size)}}


def _metrics(request: Request) -> Object:
    """The port that Prometheus asks, where the spec names one."""
    port = request.spec.runtime.metrics_port
    return {"ports": [{"name": "metrics", "containerPort": port}]} if port else {}


def _resources(request: Request) -> Object:
    platform, needs = request.platform, request.needs
    # Memory and disk are given and limited alike: nothing is gained by being killed later.
    fixed = {"memory": quantity(needs.memory), "ephemeral-storage": quantity(needs.ephemeral)}
    return {
        "requests": {"cpu": str(platform.cpus), **fixed, **platform.limits},
        "limits": {**fixed, **platform.limits},
    }

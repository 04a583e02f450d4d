"""The pod that runs the job: containers, volumes, resources, security context."""

import re
from collections.abc import Iterator, Mapping

from job import signals, storage
from job.kubernetes import constants
from job.kubernetes.context import Object, RenderContext
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
    context: RenderContext, name: str = constants.CONTAINER, labels: Mapping[str, str] | None = None
) -> Object:
    """The job's pod template; `name` is its main container's."""
    needs = context.needs
    spec: Object = {
        "restartPolicy": "Never",
        "serviceAccountName": context.name,
        # The job never calls the API server.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": needs.grace_seconds,
        "securityContext": pod_security(context.platform.groups),
        "tolerations": context.platform.tolerations,
        # On the same node, with the same credentials and device, as the main container.
        "initContainers": [container(context, constants.DOCTOR, command="doctor")],
        "containers": [{**container(context, name), **_metrics(context)}],
        "volumes": [
            {"name": CONFIG, "configMap": {"name": f"{context.name}-spec"}},
            {"name": "cache", "persistentVolumeClaim": {"claimName": context.cache.claim}},
            scratch("work", needs.work),
            scratch("tmp", needs.tmp),
            memory("shm", needs.shared_memory),
        ],
    }
    return {
        "metadata": {"labels": {**context.labels("training"), **(labels or {})}},
        "spec": {key: value for key, value in spec.items() if value != []},
    }


def templates(document: Object) -> Iterator[Object]:
    """The pod templates of a Job, a Deployment or a TrainingRuntime; none of anything else."""
    if document["kind"] in ("Job", "Deployment"):
        yield document["spec"]["template"]
    elif document["kind"] == "TrainingRuntime":
        for replicated in document["spec"]["template"]["spec"]["replicatedJobs"]:
            yield replicated["template"]["spec"]["template"]


def containers(spec: Object) -> list[Object]:
    """All containers of a pod, init containers first."""
    return [*spec.get("initContainers", ()), *spec["containers"]]


def container(
    context: RenderContext, name: str = constants.CONTAINER, command: str = "run"
) -> Object:
    """A container that runs the job, or another command on the same spec."""
    spec: Object = {
        "name": name,
        "image": context.image,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments(context, command),
        "env": [
            {"name": key, "value": literal(value)}
            for key, value in sorted(_environ(context).items())
        ],
        "envFrom": [{"secretRef": {"name": constants.SECRET, "optional": True}}],
        "resources": _resources(context),
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": CONFIG, "mountPath": constants.SPEC_DIR, "readOnly": True},
            *({"name": name, "mountPath": path} for name, path in MOUNTS.items()),
        ],
    }
    return {key: value for key, value in spec.items() if value != []}


def _environ(context: RenderContext) -> dict[str, str]:
    # Without it the job would assume Kubernetes' default of 30 seconds to save a checkpoint.
    return {**context.environ, signals.GRACE_VARIABLE: str(context.needs.grace_seconds)}


def arguments(context: RenderContext, command: str) -> list[str]:
    """Arguments for the image's entrypoint."""
    settings = {
        # A pod without its GPU must fail, not train on the CPU for weeks.
        "runtime.accelerator": context.platform.accelerator,
        "runtime.cache_dir": constants.CACHE,
        # Beside a result on the cache volume, which is then linked from it instead of copied.
        "runtime.workdir": f"{constants.CACHE}/work" if _is_local(context) else constants.WORK,
    }
    sets = (*context.sets, *(f"{key}={value}" for key, value in settings.items()))
    args = ["--log-format=json", command, f"{constants.SPEC_DIR}/{constants.SPEC_FILE}"]
    args += [f"--set={item}" for item in sets]
    if context.output:
        args.append(f"--output={context.output}")
    return [literal(each) for each in args]


def _is_local(context: RenderContext) -> bool:
    return storage.is_local(context.output_uri)


def literal(text: str) -> str:
    """Escapes an argument or variable, which may contain LaTeX, for Kubernetes.

    Kubernetes expands `$(NAME)` and unescapes `$$` to `$`.
    """
    return _DOLLARS.sub(lambda found: 2 * found[0], text)


def pod_security(groups: tuple[int, ...] = ()) -> Object:
    """A pod's security context under the Pod Security Standard `restricted`."""
    spec: Object = {
        "runAsNonRoot": True,
        "runAsUser": constants.UID,
        "runAsGroup": constants.UID,
        "fsGroup": constants.UID,
        # Otherwise every start changes the owner of all files in the cache.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {**spec, "supplementalGroups": list(groups)} if groups else spec


def container_security() -> Object:
    """A container's security context under `restricted`, with a read-only root file system."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def scratch(name: str, size: int) -> Object:
    """A volume on the node's disk that lives as long as the pod."""
    return {"name": name, "emptyDir": {"sizeLimit": quantity(size)}}


def memory(name: str, size: int) -> Object:
    """A volume in memory; /dev/shm is 64 MB by default, too little for data loader workers."""
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": quantity(size)}}


def _metrics(context: RenderContext) -> Object:
    """The port that Prometheus scrapes, if the spec sets one."""
    port = context.spec.runtime.metrics_port
    return {"ports": [{"name": "metrics", "containerPort": port}]} if port else {}


def _resources(context: RenderContext) -> Object:
    platform, needs = context.platform, context.needs
    # Requests equal limits: a pod that exceeds its request would only be killed later.
    limits = {
        "memory": quantity(needs.memory),
        "ephemeral-storage": quantity(needs.ephemeral),
        **platform.device_limits,
    }
    return {"requests": {"cpu": str(platform.cpus), **limits}, "limits": limits}

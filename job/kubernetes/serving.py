"""Serving the exported weights: vLLM behind a Service, and a smoke Job that asks it a question."""

import math

from job import storage
from job.errors import SpecError
from job.kubernetes import batch, cache_volume, constants, objects, pod
from job.kubernetes.context import Object, RenderContext
from job.kubernetes.platforms import GPU_RESOURCES, tolerations
from job.kubernetes.resources import quantity
from job.planning.requirements import UPLOAD_RATE

SERVER, SMOKE = "serving", "smoke"
HEALTH = {"httpGet": {"path": "/health", "port": "http"}}
STARTUP_SECONDS = 30 * 60
"""Time for vLLM to load the weights and compile kernels."""
ANSWER_SECONDS = 5
"""A server that compiles or computes a long batch does not answer within the default of 1."""

# The vLLM image does not know the cache volume and the pod's user, who may have no name. What has
# no variable here is written below HOME: AITER's and FlyDSL's kernels, MIOpen's and comgr's caches.
_ENVIRON = {
    "HOME": constants.CACHE,
    "USER": "vllm",
    "LOGNAME": "vllm",
    "XDG_CACHE_HOME": f"{constants.CACHE}/xdg",
    "XDG_CONFIG_HOME": f"{constants.CACHE}/config",
    "HF_HOME": f"{constants.CACHE}/huggingface",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CACHE_ROOT": f"{constants.CACHE}/vllm",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHINDUCTOR_CACHE_DIR": f"{constants.CACHE}/inductor",
    "TRITON_CACHE_DIR": f"{constants.CACHE}/triton",
}
_WEIGHTS = {"name": "weights", "mountPath": constants.WEIGHTS}
_MOUNTS = [{"name": name, "mountPath": path} for name, path in pod.MOUNTS.items() if name != "work"]


def deployment(context: RenderContext) -> list[Object]:
    """vLLM serving the job's merged weights, which it fetches and verifies itself.

    Raises SpecError if the job exports no merged weights, or only to a local folder.
    """
    _check_servable(context)
    readers: list[Object] = [{"podSelector": {}}]
    if context.cluster.metrics_from:
        readers.append(objects.monitoring(context))
    return [
        objects.service_account(context, SERVER, "-vllm"),
        *_weights_claim(context),
        objects.network_policy(
            context,
            SERVER,
            "-vllm",
            ingress=({"from": readers, "ports": [objects.tcp(constants.VLLM_PORT)]},),
        ),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": context.metadata(SERVER, "-vllm"),
            "spec": {
                "selector": context.selector(SERVER),
                "ports": [{"name": "http", "port": constants.VLLM_PORT, "targetPort": "http"}],
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": context.metadata(SERVER, "-vllm"),
            "spec": {
                "replicas": 1,
                # The default is ten minutes, less than vLLM may take to start.
                "progressDeadlineSeconds": STARTUP_SECONDS
                + math.ceil(context.needs.weights / UPLOAD_RATE),
                # A rolling update would need a second GPU.
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": context.selector(SERVER)},
                "template": {
                    "metadata": {"labels": context.labels(SERVER)},
                    "spec": _server_pod(context),
                },
            },
        },
    ]


def smoke_job(context: RenderContext) -> list[Object]:
    """A Job that asks the server a question, about an image if the model reads them.

    The Job fails unless the server answers.
    """
    server = [{"podSelector": {"matchLabels": context.selector(SERVER)}}]
    egress = {"to": server, "ports": [objects.tcp(constants.VLLM_PORT)]}
    template = {
        "metadata": {"labels": context.labels(SMOKE)},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": pod.pod_security(),
            "tolerations": tolerations(*GPU_RESOURCES),
            "containers": [_client_container(context)],
            "volumes": [{"name": "cache", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
        },
    }
    return [
        objects.network_policy(context, SMOKE, "-vllm-smoke", egress=(egress,)),
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": context.metadata(SMOKE, "-vllm-smoke"),
            "spec": batch.job_spec(template),
        },
    ]


def is_servable(context: RenderContext) -> bool:
    """Whether `deployment` can serve what the job exports."""
    return context.spec.export.merged.enabled and not storage.is_local(context.output_uri)


def _check_servable(context: RenderContext) -> None:
    if not context.spec.export.merged.enabled:
        raise SpecError("$.export.merged.enabled", "must be true for vLLM to serve", value=False)
    if storage.is_local(context.output_uri):
        raise SpecError(
            "$.output.uri",
            "must be a bucket: the server fetches the weights from it",
            value=context.spec.output.uri,
            fix="--output s3://bucket/prefix",
        )


def _client_container(context: RenderContext) -> Object:
    """`job ask`, waiting for the server to start."""
    limits = {"memory": "2Gi", "ephemeral-storage": "1Gi"}
    return {
        "name": constants.CONTAINER,
        "image": context.image,
        "imagePullPolicy": "IfNotPresent",
        "args": [
            "--log-format=json",
            "ask",
            f"http://{context.name}-vllm:{constants.VLLM_PORT}",
            f"--model={context.name}",
            _literal(context, "data.instruction", f"--question={_question(context)}"),
            *_system(context),
            *(() if context.family.reads_images else ("--no-image",)),
            *(("--enable-thinking",) if context.spec.eval.generation.enable_thinking else ()),
            f"--wait={STARTUP_SECONDS}",
        ],
        "resources": {"requests": {"cpu": "500m", **limits}, "limits": limits},
        "securityContext": pod.container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "cache", "mountPath": constants.CACHE},
            {"name": "tmp", "mountPath": constants.TMP},
        ],
    }


def _system(context: RenderContext) -> tuple[str, ...]:
    """The system prompt that the model was trained with, if the spec has one."""
    system = context.spec.data.system
    return () if system is None else (_literal(context, "data.system", f"--system={system}"),)


def _question(context: RenderContext) -> str:
    """The spec's question; any will do if each row has its own."""
    default = "What does the image show?" if context.family.reads_images else "Who are you?"
    return context.spec.data.question or default


def _server_pod(context: RenderContext) -> Object:
    needs, platform = context.needs, context.platform
    spec: Object = {
        "automountServiceAccountToken": False,
        "serviceAccountName": f"{context.name}-vllm",
        "enableServiceLinks": False,
        "securityContext": pod.pod_security(platform.groups),
        "tolerations": platform.tolerations,
        "initContainers": [_fetch_container(context)],
        "containers": [_server_container(context)],
        "volumes": [
            _weights_volume(context),
            pod.scratch("cache", platform.server_cache),
            pod.scratch("tmp", needs.tmp),
            pod.memory("shm", needs.shared_memory),
        ],
    }
    return {key: value for key, value in spec.items() if value != []}


def _weights_claim(context: RenderContext) -> list[Object]:
    """The claim that keeps the weights when the pod is replaced, if one is asked for."""
    if context.cluster.weights == "node":
        return []
    shared = context.cluster.weights == "shared"
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {**context.metadata(SERVER), "name": _weights_name(context)},
            "spec": {
                "accessModes": ["ReadWriteMany" if shared else "ReadWriteOnce"],
                "resources": {"requests": {"storage": quantity(_weights_bytes(context))}},
            },
        }
    ]


def _weights_bytes(context: RenderContext) -> int:
    """On a claim, new weights are complete before those of an earlier run are removed."""
    weights = context.needs.weights
    return weights if context.cluster.weights == "node" else cache_volume.size_class(2 * weights)


def _weights_name(context: RenderContext) -> str:
    cluster = context.cluster
    return cache_volume.claim_name(
        f"{context.name}-vllm",
        _weights_bytes(context),
        shared=cluster.weights == "shared",
        storage_class=cluster.storage_class,
    )


def _weights_volume(context: RenderContext) -> Object:
    if context.cluster.weights == "node":
        return pod.scratch("weights", _weights_bytes(context))
    return {"name": "weights", "persistentVolumeClaim": {"claimName": _weights_name(context)}}


def _fetch_container(context: RenderContext) -> Object:
    """`job fetch`: downloads the merged weights and verifies their digests."""
    limits = {"memory": "2Gi", **_disk(context)}
    return {
        "name": "weights",
        "image": context.image,
        "imagePullPolicy": "IfNotPresent",
        "args": [
            "--log-format=json",
            "fetch",
            _literal(context, "output.uri", context.output_uri),
            "--part=merged",
            f"--to={constants.WEIGHTS}",
        ],
        "envFrom": [{"secretRef": {"name": constants.SECRET, "optional": True}}],
        "resources": {"requests": {"cpu": "1", **limits}, "limits": limits},
        "securityContext": pod.container_security(),
        "volumeMounts": [_WEIGHTS, *_MOUNTS],
    }


def _server_container(context: RenderContext) -> Object:
    """vLLM's OpenAI-compatible server."""
    needs, platform = context.needs, context.platform
    limits = {
        "memory": quantity(needs.server_memory + needs.shared_memory),
        **_disk(context),
        **platform.device_limits,
    }
    return {
        "name": "vllm",
        "image": platform.vllm_image,
        "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        "args": [
            f"--model={constants.WEIGHTS}",
            f"--served-model-name={context.name}",
            f"--port={constants.VLLM_PORT}",
            f"--dtype={context.spec.export.merged.dtype}",
            # If these trust remote code, it is the project's own, exported beside the weights.
            *context.family.vllm_arguments,
        ],
        "env": [{"name": name, "value": value} for name, value in _ENVIRON.items()],
        "ports": [{"name": "http", "containerPort": constants.VLLM_PORT}],
        "startupProbe": {
            **HEALTH,
            "periodSeconds": 10,
            "timeoutSeconds": ANSWER_SECONDS,
            "failureThreshold": STARTUP_SECONDS // 10,
        },
        "readinessProbe": {
            **HEALTH,
            "periodSeconds": 10,
            "timeoutSeconds": ANSWER_SECONDS,
            "failureThreshold": 3,
        },
        "livenessProbe": {
            **HEALTH,
            "periodSeconds": 20,
            "timeoutSeconds": 10,
            "failureThreshold": 3,
        },
        "resources": {"requests": {"cpu": str(platform.cpus), **limits}, "limits": limits},
        "securityContext": pod.container_security(),
        "volumeMounts": [{**_WEIGHTS, "readOnly": True}, *_MOUNTS],
    }


def _disk(context: RenderContext) -> dict[str, str]:
    """The node's disk for the pod's volumes on it, and as much again as /tmp for logs."""
    on_node = _weights_bytes(context) if context.cluster.weights == "node" else 0
    size = on_node + context.platform.server_cache + 2 * context.needs.tmp
    return {"ephemeral-storage": quantity(size)}


def _literal(context: RenderContext, key: str, text: str) -> str:
    """An argument from a value of the spec. Raises SpecError if it contains a secret."""
    for name, secret in context.secrets.items():
        if secret and secret in text:
            raise SpecError(
                f"$.{key}",
                f"contains {name}, a secret, which the manifest would show",
                fix=f"remove it, for example with --set {key}=…",
            )
    return pod.literal(text)

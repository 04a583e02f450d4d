"""Serving what a job exported: vLLM behind a Service, and a Job that asks it a question."""

import math

from job import storage
from job.errors import SpecError
from job.kubernetes import batch, constants, objects, pod
from job.kubernetes.context import Object, Request
from job.kubernetes.resources import quantity
from job.planning.requirements import UPLOAD_RATE

SERVER, SMOKE = "serving", "smoke"
HEALTH = {"httpGet": {"path": "/health", "port": "http"}}
UP_SECONDS = 30 * 60
"""Loading the weights and compiling kernels may take this long."""


def deployment(request: Request) -> list[Object]:
    """vLLM with the merged weights of the job's output, which it fetches and checks itself.

    Raises SpecError where there will be no such weights, or none that another pod can reach.
    """
    _can_be_served(request)
    needs = request.needs
    labels = request.labels(SERVER)
    return [
        objects.service_account(request, SERVER, "-vllm"),
        objects.network_policy(
            request,
            SERVER,
            "-vllm",
            ingress=({"from": [{"podSelector": {}}], "ports": [objects.tcp(constants.VLLM_PORT)]},),
        ),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": request.metadata(SERVER, "-vllm"),
            "spec": {
                "selector": request.selector(SERVER),
                "ports": [{"name": "http", "port": constants.VLLM_PORT, "targetPort": "http"}],
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": request.metadata(SERVER, "-vllm"),
            "spec": {
                "replicas": 1,
                # Else Kubernetes calls it failed after ten minutes.
                "progressDeadlineSeconds": UP_SECONDS + math.ceil(needs.weights / UPLOAD_RATE),
                # Two at a time would ask for a second GPU during an update.
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": request.selector(SERVER)},
                "template": {"metadata": {"labels": labels}, "spec": _server(request)},
            },
        },
    ]


def smoke_job(request: Request) -> list[Object]:
    """A Job that asks the server, about an image where it reads them; fails without an answer."""
    needs = {"cpu": "500m", "memory": "2Gi", "ephemeral-storage": "1Gi"}
    limits = {"memory": "2Gi", "ephemeral-storage": "1Gi"}
    server = [{"podSelector": {"matchLabels": request.selector(SERVER)}}]
    asks: Object = {
        "name": constants.CONTAINER,
        "image": request.image,
        "imagePullPolicy": "IfNotPresent",
        "args": [
            "--log-format=json",
            "ask",
            f"http://{request.name}-vllm:{constants.VLLM_PORT}",
            f"--model={request.name}",
            _literal(request, "data.instruction", f"--question={_question(request)}"),
            *(() if request.family.reads_images else ("--no-image",)),
            f"--wait={UP_SECONDS}",
        ],
        "resources": {"requests": needs, "limits": limits},
        "securityContext": pod.container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "cache", "mountPath": constants.CACHE},
            {"name": "tmp", "mountPath": constants.TMP},
        ],
    }
    template = {
        "metadata": {"labels": request.labels(SMOKE)},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": pod.pod_security(),
            "containers": [asks],
            "volumes": [{"name": "cache", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
        },
    }
    egress = {"to": server, "ports": [objects.tcp(constants.VLLM_PORT)]}
    return [
        objects.network_policy(request, SMOKE, "-vllm-smoke", egress=(egress,)),
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": request.metadata(SMOKE, "-vllm-smoke"),
            "spec": batch.spec(template),
        },
    ]


def _can_be_served(request: Request) -> None:
    if not request.spec.export.merged.enabled:
        raise SpecError("$.export.merged.enabled", "must be true for vLLM to serve", value=False)
    if storage.is_local(request.output_uri):
        raise SpecError(
            "$.output.uri",
            "must be a bucket, for the server to fetch the weights from it",
            value=request.spec.output.uri,
            fix="--output s3://bucket/prefix",
        )


def _literal(request: Request, key: str, text: str) -> str:
    """An argument made of a value of the spec. Raises SpecError where a secret is part of it."""
    for name, secret in request.secrets.items():
        if secret and secret in text:
            raise SpecError(
                f"$.{key}",
                f"holds {name}, a secret, which the manifest would show",
                fix=f"write it without, as in --set {key}=…",
            )
    return pod.literal(text)


def _question(request: Request) -> str:
    """What the rows asked; any answer will do where each asked its own."""
    asked = "What does the image show?" if request.family.reads_images else "Who are you?"
    return request.spec.data.question or asked


def _server(request: Request) -> Object:
    needs, platform = request.needs, request.platform
    weights = {"name": "weights", "mountPath": constants.WEIGHTS}
    volumes = [
        pod.scratch("weights", needs.weights),
        pod.scratch("cache", needs.tmp),
        pod.scratch("tmp", needs.tmp),
        pod.memory("shm", needs.shared_memory),
    ]
    mounts = [
        {"name": name, "mountPath": path} for name, path in pod.MOUNTS.items() if name != "work"
    ]
    disk = {"ephemeral-storage": quantity(needs.weights + 3 * needs.tmp)}
    memory = {"memory": quantity(needs.server_memory + needs.shared_memory)}
    found: Object = {
        "automountServiceAccountToken": False,
        "serviceAccountName": f"{request.name}-vllm",
        "enableServiceLinks": False,
        "securityContext": pod.pod_security(platform.groups),
        "tolerations": platform.tolerations,
        "initContainers": [
            {
                "name": "weights",
                "image": request.image,
                "imagePullPolicy": "IfNotPresent",
                "args": [
                    "--log-format=json",
                    "fetch",
                    _literal(request, "output.uri", request.output_uri),
                    "--part=merged",
                    f"--to={constants.WEIGHTS}",
                ],
                "envFrom": [{"secretRef": {"name": constants.SECRET, "optional": True}}],
                "resources": {
                    "requests": {"cpu": "1", "memory": "2Gi", **disk},
                    "limits": {"memory": "2Gi", **disk},
                },
                "securityContext": pod.container_security(),
                "volumeMounts": [weights, *mounts],
            }
        ],
        "containers": [
            {
                "name": "vllm",
                "image": platform.vllm_image,
                "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
                "args": [
                    f"--model={constants.WEIGHTS}",
                    f"--served-model-name={request.name}",
                    f"--port={constants.VLLM_PORT}",
                    f"--dtype={request.spec.export.merged.dtype}",
                    # Code, if any, is of the project's own modules beside the weights.
                    *request.family.vllm_arguments,
                ],
                "env": [{"name": name, "value": value} for name, value in _ENVIRON.items()],
                "ports": [{"name": "http", "containerPort": constants.VLLM_PORT}],
                "startupProbe": {
                    **HEALTH,
                    "periodSeconds": 10,
                    "failureThreshold": UP_SECONDS // 10,
                },
                "readinessProbe": {**HEALTH, "periodSeconds": 5, "failureThreshold": 3},
                "livenessProbe": {
                    **HEALTH,
                    "periodSeconds": 20,
                    "timeoutSeconds": 10,
                    "failureThreshold": 3,
                },
                "resources": {
                    "requests": {"cpu": str(platform.cpus), **memory, **disk, **platform.limits},
                    "limits": {**memory, **disk, **platform.limits},
                },
                "securityContext": pod.container_security(),
                "volumeMounts": [{**weights, "readOnly": True}, *mounts],
            }
        ],
        "volumes": volumes,
    }
    return {key: value for key, value in found.items() if value != []}


# Another project's image: it knows nothing of this volume, nor has it a user of this number.
_ENVIRON = {
    "HOME": constants.CACHE,
    "USER": "vllm",
    "HF_HOME": f"{constants.CACHE}/huggingface",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CACHE_ROOT": f"{constants.CACHE}/vllm",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHINDUCTOR_CACHE_DIR": f"{constants.CACHE}/inductor",
    "TRITON_CACHE_DIR": f"{constants.CACHE}/triton",
}

"""The folder `k8s/`: the manifests of one spec, ready for kubectl and for kustomize.

finetune-job.yaml           the job on AMD, alone: kubectl apply -f
trainjob.yaml               the same on several nodes
vllm-deployment.yaml        vLLM on AMD with what the job exported
vllm-smoke-job.yaml         asks it a question
base/                       finetune-job.yaml and vllm-deployment.yaml for the overlays, which
vllm/                       kustomize allows to read neither files nor folders above them
components/                 a queue and ways to reach S3, for any overlay
overlays/                   one each for kubectl apply -k
"""

from collections.abc import Mapping
from dataclasses import dataclass

from job.kubernetes import batch, features, overlays, serving, trainjob, yaml_text
from job.kubernetes.context import Object, Request

KUSTOMIZE = "kustomize.config.k8s.io"
JOB, TRAINJOB = "finetune-job.yaml", "trainjob.yaml"
SERVER, SMOKE = "vllm-deployment.yaml", "vllm-smoke-job.yaml"
KUSTOMIZATION = "kustomization.yaml"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One spec on every platform, and another for the test on a CPU."""

    amd: Request
    nvidia: Request
    several: Request
    """On AMD too, on several nodes."""
    smoke: Request | None


def files(wanted: Wanted) -> Mapping[str, list[Object]]:
    """The documents of every file by its path in the folder."""
    job, server = batch.bundle(wanted.amd), serving.deployment(wanted.amd)
    found: dict[str, list[Object]] = {
        JOB: job,
        TRAINJOB: trainjob.bundle(wanted.several),
        SERVER: server,
        SMOKE: serving.smoke_job(wanted.amd),
        f"base/{JOB}": job,
        f"base/{KUSTOMIZATION}": [_kustomization(resources=[JOB])],
        f"vllm/{SERVER}": server,
        f"vllm/{KUSTOMIZATION}": [_kustomization(resources=[SERVER])],
        _overlay("nvidia"): [
            _kustomization(
                resources=["../../base"], patches=_patches(job, batch.bundle(wanted.nvidia))
            )
        ],
        _overlay("vllm-nvidia"): [
            _kustomization(
                resources=["../../vllm"],
                patches=_patches(server, serving.deployment(wanted.nvidia)),
            )
        ],
    }
    for name, feature in features.FEATURES.items():
        both = [*job, *server]
        found[f"components/{name}/{KUSTOMIZATION}"] = [
            _kustomization("Component", patches=_patches(both, features.apply(feature, both)))
        ]
        found[_overlay(name)] = [
            _kustomization(resources=["../../base"], components=[f"../../components/{name}"])
        ]
    if wanted.smoke is not None:
        found[f"overlays/cpu-smoke/{JOB}"] = batch.bundle(wanted.smoke)
        found[_overlay("cpu-smoke")] = [_kustomization(resources=[JOB])]
    return found


def _overlay(name: str) -> str:
    return f"overlays/{name}/{KUSTOMIZATION}"


def _kustomization(kind: str = "Kustomization", **more: object) -> Object:
    version = "v1beta1" if kind == "Kustomization" else "v1alpha1"
    return {"apiVersion": f"{KUSTOMIZE}/{version}", "kind": kind, **more}


def _patches(before: list[Object], after: list[Object]) -> list[Object]:
    """Kustomize takes the operations as a text of YAML."""
    return [
        {**patch, "patch": yaml_text.dump([patch["patch"]])}
        for patch in overlays.between(before, after)
    ]

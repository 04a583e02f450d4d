"""The folder `k8s/`: the manifests of one spec, ready for kubectl and for kustomize.

finetune-job.yaml           the job on one AMD node: kubectl apply -f
trainjob.yaml               the same on several nodes
vllm-deployment.yaml        vLLM on AMD, serving the exported weights
vllm-smoke-job.yaml         asks the server a question
base/, trainjob/, vllm/     copies of the first three for overlays and components, since kustomize
                            reads no files outside a kustomization
components/                 a queue and ways to authenticate to S3, for any overlay
overlays/                   each one for kubectl apply -k; parity/ runs `job parity` on an AMD node
monitoring/                 for the Prometheus operator and Grafana: every job of a namespace
"""

from collections.abc import Mapping
from dataclasses import dataclass

from job.kubernetes import bundles, features, monitoring, overlays, trainjob, yaml_text
from job.kubernetes.context import Object, RenderContext

KUSTOMIZE = "kustomize.config.k8s.io"
JOB, TRAINJOB = "finetune-job.yaml", "trainjob.yaml"
SERVER, SMOKE = "vllm-deployment.yaml", "vllm-smoke-job.yaml"
KUSTOMIZATION = "kustomization.yaml"


@dataclass(frozen=True, kw_only=True)
class FolderContexts:
    """One spec on every GPU platform, and another one for the CPU smoke test."""

    amd: RenderContext
    nvidia: RenderContext
    multi_node: RenderContext
    """On several AMD nodes."""
    smoke: RenderContext | None
    parity: RenderContext | None
    """The smoke test's spec on an AMD node."""


def files(contexts: FolderContexts) -> Mapping[str, list[Object]]:
    """The documents of every file, by path in the folder."""
    job, server = bundles.job(contexts.amd), bundles.server(contexts.amd)
    several = bundles.several_nodes(contexts.multi_node)
    documents: dict[str, list[Object]] = {
        JOB: job,
        TRAINJOB: several,
        SERVER: server,
        SMOKE: bundles.smoke(contexts.amd),
        f"base/{JOB}": job,
        f"base/{KUSTOMIZATION}": [_kustomization(resources=[JOB])],
        f"trainjob/{TRAINJOB}": several,
        f"trainjob/{KUSTOMIZATION}": [_kustomization(resources=[TRAINJOB])],
        f"vllm/{SERVER}": server,
        f"vllm/{KUSTOMIZATION}": [_kustomization(resources=[SERVER])],
        _overlay("nvidia"): [
            _kustomization(
                resources=["../../base"], patches=_patches(job, bundles.job(contexts.nvidia))
            )
        ],
        _overlay("vllm-nvidia"): [
            _kustomization(
                resources=["../../vllm"],
                patches=_patches(server, bundles.server(contexts.nvidia)),
            )
        ],
    }
    watching = monitoring.files(contexts.amd.cluster)
    documents |= {f"monitoring/{file}": found for file, found in watching.items()}
    documents[f"monitoring/{KUSTOMIZATION}"] = [_kustomization(resources=[*watching])]
    for name, feature in features.FEATURES.items():
        every = [*job, *server, *(each for each in several if each["apiVersion"] == trainjob.API)]
        changed = features.apply(feature, every, sorted(contexts.amd.secrets))
        documents[f"components/{name}/{KUSTOMIZATION}"] = [
            _kustomization("Component", patches=_patches(every, changed))
        ]
        documents[_overlay(name)] = [
            _kustomization(resources=["../../base"], components=[f"../../components/{name}"])
        ]
    if contexts.smoke is not None:
        documents[f"overlays/cpu-smoke/{JOB}"] = bundles.job(contexts.smoke)
        documents[_overlay("cpu-smoke")] = [_kustomization(resources=[JOB])]
    if contexts.parity is not None:
        documents[f"overlays/parity/{JOB}"] = bundles.parity(contexts.parity)
        documents[_overlay("parity")] = [_kustomization(resources=[JOB])]
    return documents


def _overlay(name: str) -> str:
    return f"overlays/{name}/{KUSTOMIZATION}"


def _kustomization(kind: str = "Kustomization", **more: object) -> Object:
    version = "v1beta1" if kind == "Kustomization" else "v1alpha1"
    return {"apiVersion": f"{KUSTOMIZE}/{version}", "kind": kind, **more}


def _patches(before: list[Object], after: list[Object]) -> list[Object]:
    """Kustomize expects a patch's operations as YAML text."""
    return [
        {**patch, "patch": yaml_text.dump([patch["patch"]])}
        for patch in overlays.between(before, after)
    ]

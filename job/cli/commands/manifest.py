"""The command `manifest`; its options about a cluster are those of `kubernetes.cluster_options`.

The docstring is the command's help.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from job import log
from job.cli import completion
from job.cli.parameters import Output, Overrides, Spec

PLATFORMS = ("amd", "nvidia", "cpu")
KINDS = ("job", "trainjob", "vllm", "vllm-smoke", "parity", "quota")
PANEL = "About the cluster"

Platform = Annotated[
    str,
    typer.Option(help="amd, nvidia or cpu.", autocompletion=completion.one_of(*PLATFORMS)),
]
Kind = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}.",
        autocompletion=completion.one_of(*KINDS),
    ),
]
Nodes = Annotated[int, typer.Option(help="More than one makes it a TrainJob.")]
Registry = Annotated[str | None, typer.Option(help="The registry of your images.")]
Image = Annotated[
    str | None, typer.Option(help="The job's image, best with its digest: REF@sha256:….")
]
VllmImage = Annotated[str | None, typer.Option(help="The server's image instead of vLLM's own.")]
CacheSize = Annotated[
    str | None, typer.Option(help="The cache's volume, as in 200Gi (default: as needed).")
]
CacheClaim = Annotated[
    str | None, typer.Option(help="Cache on this existing claim; the manifest has none.")
]
Directory = Annotated[
    Path | None, typer.Option(help="Write all manifests, with their overlays, to this folder.")
]
Smoke = Annotated[
    str | None, typer.Option(help="With --directory, the spec of the CPU smoke test.")
]


def _one(help: str, metavar: str = "NAME") -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=help, metavar=metavar, rich_help_panel=PANEL
    )
    return option


def _many(help: str, metavar: str = "KEY=VALUE") -> typer.models.OptionInfo:
    return _one(f"{help} Repeatable.", metavar)


File = Annotated[
    str | None, _one("A YAML file of the options below, such as `namespace: team`.", "FILE")
]
Namespace = Annotated[str | None, _one("The namespace of every object.")]
Label = Annotated[list[str] | None, _many("A label of every object and pod.")]
Annotation = Annotated[list[str] | None, _many("An annotation of every object and pod.")]
NodeSelector = Annotated[
    list[str] | None,
    _many("A node label, such as amd.com/gpu.product-name=AMD_Instinct_MI300X_OAM."),
]
Tolerations = Annotated[
    list[str] | None,
    _many("A taint to tolerate beside the GPUs'.", "KEY[=VALUE][:EFFECT]"),
]
PriorityClass = Annotated[str | None, _one("The pods' PriorityClass.")]
RuntimeClass = Annotated[str | None, _one("The RuntimeClass of pods with a GPU: nvidia.")]
PullSecret = Annotated[list[str] | None, _many("A Secret to pull images with.", "NAME")]
StorageClass = Annotated[str | None, _one("The StorageClass of every volume claim.")]
GpuResource = Annotated[
    str | None, _one("The GPU's resource, such as amd.com/cpx_nps4 or nvidia.com/mig-3g.40gb.")
]
DeviceClass = Annotated[
    str | None, _one("Claim the GPU (DRA) from this class, such as gpu.amd.com or gpu.nvidia.com.")
]
DeviceSelector = Annotated[
    list[str] | None, _many("A CEL expression that the claimed device satisfies.", "CEL")
]
RdmaResource = Annotated[
    list[str] | None,
    _many(
        "An RDMA device of each pod of several nodes: rdma/hca_shared_devices_a.", "NAME[=COUNT]"
    ),
]
Env = Annotated[
    list[str] | None, _many("A variable of every container: NCCL_SOCKET_IFNAME=eth0.", "NAME=VALUE")
]
Proxy = Annotated[str | None, _one("The proxy to the hub and to buckets.", "URL")]
NoProxy = Annotated[
    list[str] | None, _many("Hosts reached without it, beside the cluster's own.", "HOSTS")
]
EgressPort = Annotated[
    list[str] | None,
    _many("A TCP port to open, beside AWS_ENDPOINT_URL's and the proxy's.", "PORT"),
]
MetricsFrom = Annotated[str | None, _one("The only namespace that may read metrics.")]
Ttl = Annotated[str | None, _one("Delete finished Jobs after this time.", "SECONDS")]
Openshift = Annotated[
    bool,
    typer.Option("--openshift", help="Leave users and groups to OpenShift.", rich_help_panel=PANEL),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="vLLM's weights: on the node, on a claim of its own, or a claim shared by nodes.",
        metavar="node|claim|shared",
        rich_help_panel=PANEL,
        autocompletion=completion.one_of("node", "claim", "shared"),
    ),
]


def manifest(
    spec: Spec,
    platform: Platform = "amd",
    nodes: Nodes = 1,
    kind: Kind = "job",
    registry: Registry = None,
    image: Image = None,
    vllm_image: VllmImage = None,
    cache_size: CacheSize = None,
    cache_claim: CacheClaim = None,
    directory: Directory = None,
    smoke: Smoke = None,
    set: Overrides = None,
    output: Output = None,
    cluster: File = None,
    namespace: Namespace = None,
    label: Label = None,
    annotation: Annotation = None,
    node_selector: NodeSelector = None,
    toleration: Tolerations = None,
    priority_class: PriorityClass = None,
    runtime_class: RuntimeClass = None,
    pull_secret: PullSecret = None,
    storage_class: StorageClass = None,
    gpu_resource: GpuResource = None,
    device_class: DeviceClass = None,
    device_selector: DeviceSelector = None,
    rdma_resource: RdmaResource = None,
    env: Env = None,
    proxy: Proxy = None,
    no_proxy: NoProxy = None,
    egress_port: EgressPort = None,
    metrics_from: MetricsFrom = None,
    ttl: Ttl = None,
    openshift: Openshift = False,
    weights: Weights = None,
) -> None:
    """Print or write the Kubernetes manifests of a job.

    The options about the cluster are the same for every kind, and can be kept in a file.
    """
    given: Mapping[str, object] = locals().copy()
    from job import kubernetes

    names = kubernetes.cluster_options.OPTIONS
    texts = {name: _texts(given[name.replace("-", "_")]) for name in names}
    options = kubernetes.ManifestOptions(
        spec=spec,
        sets=tuple(set or ()),
        output=output,
        registry=registry,
        image=image,
        vllm_image=vllm_image,
        cache_size=cache_size,
        cache_claim=cache_claim,
        cluster=kubernetes.cluster_options.read(texts, cluster),
        environ=os.environ,
    )
    if directory is not None:
        written = kubernetes.folder(options, nodes, smoke)
        kubernetes.write(directory, written)
        log.info("written", files=len(written), folder=directory)
    else:
        print(kubernetes.render(options, platform, nodes, kind), end="")
        if command := kubernetes.replacing(options, nodes, kind):
            log.info(
                "pods of an existing job cannot be changed: to apply this over one that was "
                "rendered for another platform, image or spec, delete it first",
                command=command,
            )


def _texts(value: object) -> Sequence[str]:
    """The values of an option, as written; empty if it was not given."""
    if value is None or value is False:
        return ()
    if isinstance(value, list):
        return value
    return ("true",) if value is True else (str(value),)

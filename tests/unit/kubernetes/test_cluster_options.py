"""What the options about a cluster change in manifests, and which values they refuse."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from job import kubernetes
from job.errors import UsageError
from job.kubernetes import constants
from job.kubernetes.cluster import Cluster
from job.kubernetes.cluster_options import OPTIONS, read
from job.kubernetes.options import ManifestOptions
from tests import manifest_lint
from tests.jobs import ROOT, job
from tests.manifest_lint import schemas
from tests.manifest_lint.pods import pods

LATEX = str(ROOT / "specs/latex.yaml")
SETS = ("runtime.metrics_port=9464",)
EVERYTHING = {
    "namespace": ["team-ocr"],
    "label": ["team=ocr", "cost-center=42"],
    "annotation": ["sidecar.istio.io/inject=false"],
    "node-selector": [
        "amd.com/gpu.product-name=AMD_Instinct_MI300X_OAM",
        "nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3",
        "topology.kubernetes.io/zone=a",
    ],
    "toleration": ["dedicated=ml:NoExecute", "spot"],
    "priority-class": ["batch-low"],
    "runtime-class": ["nvidia"],
    "pull-secret": ["regcred", "regcred-2"],
    "storage-class": ["fast.ssd"],
    "gpu-resource": ["amd.com/cpx_nps4"],
    "rdma-resource": ["rdma/hca_shared_devices_a", "rdma/hca_b=2"],
    "env": ["NCCL_SOCKET_IFNAME=eth0", "GREETING=a $(B) b"],
    "proxy": ["http://proxy.example.com:3128"],
    "no-proxy": ["10.0.0.0/8,.example.com", "minio"],
    "egress-port": ["5000"],
    "metrics-from": ["monitoring"],
    "ttl": ["86400"],
    "openshift": ["true"],
    "weights": ["shared"],
}
"""Every option that goes with every other; --device-class has tests of its own."""


def options(**texts: list[str]) -> ManifestOptions:
    cluster = read({name.replace("_", "-"): values for name, values in texts.items()})
    return given(cluster)


def given(cluster: Cluster, environ: dict[str, str] | None = None) -> ManifestOptions:
    return ManifestOptions(
        spec=LATEX, sets=SETS, output="s3://b/x", cluster=cluster, environ=environ or {}
    )


def render(asked: ManifestOptions, kind: str = "job", platform: str = "amd", nodes: int = 1) -> Any:
    return list(yaml.safe_load_all(kubernetes.render(asked, platform, nodes, kind)))


def kinds(documents: Any) -> dict[str, Any]:
    return {document["kind"]: document for document in documents}


def pod(documents: Any) -> Any:
    [found] = pods(documents)
    return found.spec


@pytest.mark.parametrize("platform", ["amd", "cpu"])
@pytest.mark.parametrize("kind", [*kubernetes.KINDS])
def test_every_kind_takes_every_option_and_stays_valid(kind: str, platform: str) -> None:
    asked = given(read(EVERYTHING))
    documents = render(asked, kind, platform)
    for document in documents:
        schemas.check(document, constants.OLDEST_KUBERNETES)
        assert document["metadata"]["namespace"] == "team-ocr"
        assert document["metadata"]["labels"]["team"] == "ocr"
        assert document["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    if kind == "vllm-smoke":
        documents += render(asked, "vllm", platform)
    assert manifest_lint.problems(documents) == []
    for found in pods(documents):
        assert found.labels["cost-center"] == "42"
        assert found.spec["priorityClassName"] == "batch-low"
        assert found.spec["imagePullSecrets"] == [{"name": "regcred"}, {"name": "regcred-2"}]
        assert found.spec["tolerations"][-2:] == [
            {"key": "dedicated", "value": "ml", "effect": "NoExecute"},
            {"key": "spot", "operator": "Exists"},
        ]
        for container in found.containers:
            assert {"name": "NCCL_SOCKET_IFNAME", "value": "eth0"} in container["env"]
            assert {"name": "GREETING", "value": "a $$(B) b"} in container["env"]


def test_labels_of_a_vendor_s_nodes_concern_only_pods_with_its_gpu() -> None:
    asked = given(read(EVERYTHING))
    zone = {"topology.kubernetes.io/zone": "a"}
    product = {"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM"}
    assert pod(render(asked))["nodeSelector"] == product | zone
    assert pod(render(asked))["runtimeClassName"] == "nvidia"
    for documents in (render(asked, platform="cpu"), render(asked, "vllm-smoke")):
        assert pod(documents)["nodeSelector"] == zone
        assert "runtimeClassName" not in pod(documents)


def test_a_partition_is_asked_for_beside_the_taint_of_whole_gpus() -> None:
    spec = pod(render(options(gpu_resource=["amd.com/cpx_nps4"])))
    limits = spec["containers"][0]["resources"]["limits"]
    assert [name for name in limits if "/" in name] == ["amd.com/cpx_nps4"]
    tolerated = {each["key"] for each in spec["tolerations"]}
    assert tolerated == {"amd.com/gpu", "amd.com/cpx_nps4"}
    asked = options(gpu_resource=["amd.com/cpx_nps4"])  # of a cluster that may have no other nodes
    for documents in (render(asked, platform="cpu"), render(asked, "vllm-smoke")):
        tolerated = {each["key"] for each in pod(documents)["tolerations"]}
        assert tolerated == {"amd.com/gpu", "nvidia.com/gpu", "amd.com/cpx_nps4"}


@pytest.mark.parametrize("kind", ["job", "trainjob", "vllm"])
def test_a_gpu_is_claimed_by_every_container_that_used_to_ask_for_it(kind: str) -> None:
    chosen = 'device.attributes["gpu.amd.com"].type == "amdgpu-partition"'
    documents = render(options(device_class=["gpu.amd.com"], device_selector=[chosen]), kind)
    for document in documents:
        schemas.check(document, constants.NEWEST_KUBERNETES)
    assert manifest_lint.problems(documents) == []
    template = kinds(documents)["ResourceClaimTemplate"]
    [request] = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"] == {
        "deviceClassName": "gpu.amd.com",
        "selectors": [{"cel": {"expression": chosen}}],
    }
    spec = pod(documents)
    users = spec["containers"] + (spec["initContainers"] if kind != "vllm" else [])
    for container in users:
        assert container["resources"]["claims"] == [{"name": "gpu"}]
        assert not [name for name in container["resources"]["limits"] if "/" in name]


@pytest.mark.parametrize("kind", ["job", "vllm"])
def test_what_cannot_be_changed_in_an_object_is_part_of_its_name(kind: str) -> None:
    """Else applying the manifest over what an earlier one made would be refused for good."""

    def named(document_kind: str, **texts: list[str]) -> str:
        asked = options(weights=["claim"], **texts)
        return str(kinds(render(asked, kind))[document_kind]["metadata"]["name"])

    claim = "PersistentVolumeClaim"
    assert named(claim, storage_class=["fast.ssd"]) == f"{named(claim)}-fast.ssd"
    templates = {
        named("ResourceClaimTemplate", device_class=["gpu.amd.com"], device_selector=chosen)
        for chosen in ([], ["true"], ["false"], ["true"])
    }
    assert len(templates) == 3
    with pytest.raises(UsageError, match="--storage-class: makes a claim's name longer than 253"):
        named(claim, storage_class=["a" * 250])


def test_pods_of_several_nodes_ask_for_rdma_devices_and_those_of_one_do_not() -> None:
    asked = options(rdma_resource=["rdma/hca", "rdma/other=2"])
    for container in pod(render(asked, nodes=2))["containers"]:
        for amounts in container["resources"].values():
            assert (amounts["rdma/hca"], amounts["rdma/other"]) == ("1", "2")
    assert "rdma/" not in kubernetes.render(asked, "amd")


def test_openshift_chooses_users_and_groups_and_the_rest_stays_restricted() -> None:
    for kind in ("job", "trainjob", "vllm", "vllm-smoke"):
        spec = pod(render(options(openshift=["true"]), kind))
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & spec["securityContext"].keys()
        assert spec["securityContext"]["runAsNonRoot"] is True
    # Its DNS pods listen on another port than their Service.
    policy = kinds(render(options()))["NetworkPolicy"]["spec"]
    assert {port["port"] for port in policy["egress"][0]["ports"]} == {53, 5353}


def test_the_port_of_the_endpoint_and_of_the_proxy_and_others_are_opened() -> None:
    cluster = read({"proxy": ["http://proxy:3128"], "egress-port": ["5000"]})
    environ = {"AWS_ENDPOINT_URL": "http://ceph.storage.svc:7480"}
    for kind in ("job", "trainjob", "vllm"):
        policy = kinds(render(given(cluster, environ), kind))["NetworkPolicy"]["spec"]
        opened = [port["port"] for port in policy["egress"][1]["ports"]]
        assert opened == [443, 9000, 8333, 7480, 3128, 5000]
    asking = kinds(render(given(cluster, environ), "vllm-smoke"))["NetworkPolicy"]["spec"]
    assert [port["port"] for port in asking["egress"][-1]["ports"]] == [constants.VLLM_PORT]
    [default] = {port for port in opened if port == 443}
    plain = given(Cluster(), {"AWS_ENDPOINT_URL_S3": "https://s3.example.com"})
    policy = kinds(render(plain))["NetworkPolicy"]["spec"]
    assert [port["port"] for port in policy["egress"][1]["ports"]] == [default, 9000, 8333]


def test_the_port_of_an_endpoint_or_proxy_in_a_variable_is_opened() -> None:
    environ = {"AWS_ENDPOINT_URL": "http://the-shell-s:1", "HTTPS_PROXY": "http://the-shell-s:2"}
    added = ["AWS_ENDPOINT_URL=http://minio.x.svc:9001", "HTTPS_PROXY=http://proxy:8888"]
    added += ["HF_ENDPOINT=https://mirror", "MLFLOW_TRACKING_URI=http://mlflow:5000"]
    policy = kinds(render(given(read({"env": added}), environ)))["NetworkPolicy"]["spec"]
    opened = [port["port"] for port in policy["egress"][1]["ports"]]
    assert opened == [443, 9000, 8333, 9001, 8888, 5000]


def test_a_value_given_twice_counts_once() -> None:
    asked = read({"pull-secret": ["a", "b", "a"], "label": ["x=1", "x=1"]})
    assert (asked.pull_secrets, asked.labels) == (("a", "b"), {"x": "1"})


def test_a_proxy_is_used_for_what_is_outside_the_cluster_alone() -> None:
    asked = options(proxy=["http://proxy:3128"], no_proxy=["10.0.0.0/8, .example.com"])
    [fetching], [serving] = (
        pod(render(asked, "vllm"))[key] for key in ("initContainers", "containers")
    )
    found = {variable["name"]: variable["value"] for variable in fetching["env"]}
    assert found["HTTPS_PROXY"] == found["HTTP_PROXY"] == "http://proxy:3128"
    assert found["NO_PROXY"].split(",")[-4:] == [
        ".svc",
        ".cluster.local",
        "10.0.0.0/8",
        ".example.com",
    ]
    assert not [variable for variable in serving["env"] if "PROXY" in variable["name"]]
    assert "PROXY" not in kubernetes.render(asked, "amd", kind="vllm-smoke")


def test_one_namespace_reads_the_metrics_of_the_job_and_of_the_server() -> None:
    wanted = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    asked = options(metrics_from=["monitoring"])
    [rule] = kinds(render(asked))["NetworkPolicy"]["spec"]["ingress"]
    assert rule["from"] == [{"namespaceSelector": wanted}]
    [rule] = kinds(render(asked, "vllm"))["NetworkPolicy"]["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {}}, {"namespaceSelector": wanted}]


@pytest.mark.parametrize(
    ("weights", "modes"), [("claim", ["ReadWriteOnce"]), ("shared", ["ReadWriteMany"])]
)
def test_weights_on_a_claim_outlive_the_pod_and_leave_the_node_s_disk(
    weights: str, modes: list[str]
) -> None:
    on_node, documents = render(options(), "vllm"), render(options(weights=[weights]), "vllm")
    claim = kinds(documents)["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == modes
    [volume] = [each for each in pod(documents)["volumes"] if each["name"] == "weights"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "PersistentVolumeClaim" not in kinds(on_node)

    def disk(found: Any) -> int:
        text = pod(found)["containers"][0]["resources"]["limits"]["ephemeral-storage"]
        return int(text.removesuffix("Gi"))

    assert disk(documents) < disk(on_node)
    assert manifest_lint.problems(documents) == []


def test_what_vllm_writes_on_rocm_has_room() -> None:
    """AITER copies its kernels below HOME, and compiles all of them if AITER_JIT_DIR is set."""
    for platform, least in (("amd", 16), ("nvidia", 4)):
        spec = pod(render(options(), "vllm", platform))
        [container] = spec["containers"]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert env["HOME"] == constants.CACHE
        assert "AITER_JIT_DIR" not in env
        sizes = {
            volume["name"]: int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
            for volume in spec["volumes"]
        }
        assert sizes["cache"] >= least
        on_disk = sum(size for name, size in sizes.items() if name != "shm")
        limit = container["resources"]["limits"]["ephemeral-storage"]
        assert int(limit.removesuffix("Gi")) >= on_disk
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["timeoutSeconds"] >= 5


def test_a_job_is_kept_unless_a_ttl_is_asked_for() -> None:
    assert "ttlSecondsAfterFinished" not in kubernetes.render(options(), "amd")
    assert kinds(render(options(ttl=["60"])))["Job"]["spec"]["ttlSecondsAfterFinished"] == 60


def test_a_quota_is_what_job_server_and_smoke_test_ask_for_at_once() -> None:
    asked = options(rdma_resource=["rdma/hca"])
    [quota] = render(asked, "quota", nodes=2)
    hard = quota["spec"]["hard"]
    everything = [render(asked, nodes=2), render(asked, "vllm"), render(asked, "vllm-smoke")]
    memory = [
        int(pod(documents)["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
        for documents in everything
    ]
    assert hard["limits.memory"] == f"{2 * memory[0] + memory[1] + memory[2]}Gi"
    assert hard["pods"] == "4"
    assert hard["requests.amd.com/gpu"] == "3"
    assert hard["requests.rdma/hca"] == "2"
    assert hard["requests.cpu"] == "25"  # 2 * 8 + 8 + 0.5, rounded up
    assert hard["persistentvolumeclaims"] == "1"
    schemas.check(quota, constants.NEWEST_KUBERNETES)
    [quota] = render(options(device_class=["gpu.amd.com"]), "quota")
    assert quota["spec"]["hard"]["gpu.amd.com.deviceclass.resource.k8s.io/devices"] == "2"


# --- the file -------------------------------------------------------------------------------


def test_a_file_of_options_is_the_same_as_the_options(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("""
namespace: team-ocr
node-selector:
  amd.com/gpu.cu-count: 304
  topology.kubernetes.io/zone: a
pull-secret: [regcred, other]
egress-port: 5000
openshift: true
weights:
""")
    written = {
        "namespace": ["team-ocr"],
        "node-selector": ["amd.com/gpu.cu-count=304", "topology.kubernetes.io/zone=a"],
        "pull-secret": ["regcred", "other"],
        "egress-port": ["5000"],
        "openshift": ["true"],
    }
    assert read({}, str(file)) == read(written)
    nearer = {"namespace": ["mine"], "pull-secret": ["third"]}
    both = read({**nearer, "node-selector": ["topology.kubernetes.io/zone=b"]}, str(file))
    assert both.namespace == "mine"
    assert both.node_selector["topology.kubernetes.io/zone"] == "b"
    assert both.pull_secrets == ("regcred", "other", "third")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name-space: x", "name-space: is no option about a cluster"),
        ("namespace: [a, b]", "namespace: takes one value"),
        ("namespace: Team", "namespace: must be 1 to 63 lower-case letters"),
        ("node-selector: {driver: 1.10}", "node-selector: must be text, a whole number"),
        ("node-selector: {a: {b: c}}", "node-selector: must be text, a whole number"),
        ("- namespace", "must be a mapping of keys"),
        ("# nothing yet", "is empty"),
        ("namespace: a\nnamespace: b", "namespace"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_its_name(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        read({}, str(file))
    assert "cluster.yaml" in str(raised.value)
    assert message in str(raised.value)
    assert "specs/" not in str(raised.value)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("namespace", "a.b", "must be 1 to 63"),
        ("label", "team", "must be KEY=VALUE"),
        ("label", "team=a b", "must have a value of at most 63"),
        ("label", "app.kubernetes.io/name=x", "set by the manifest itself"),
        ("label", "trainer.kubeflow.org/trainjob-ancestor-step=x", "set by the manifest itself"),
        ("label", "job-name=x", "set by the manifest itself or by Kubernetes"),
        ("annotation", "-x=1", "must be a name such as"),
        ("annotation", "url=https://me:typed-by-hand@host/x", "contains a secret"),
        ("node-selector", "amd.com/gpu.vram=192 G", "must have a value of at most 63"),
        ("node-selector", "AMD.com/x=1", "must be a name such as"),
        ("toleration", "a:Never", "must end with NoSchedule"),
        ("toleration", "=x:NoSchedule", "must name a taint's key"),
        ("priority-class", "High", "must be lower-case"),
        ("pull-secret", "", "must be lower-case"),
        ("storage-class", "a_b", "must be lower-case"),
        ("gpu-resource", "cpx_nps4", "must be a resource of a device plugin"),
        ("gpu-resource", "kubernetes.io/gpu", "has a domain that Kubernetes keeps"),
        ("gpu-resource", "requests.amd.com/gpu", "has a domain that Kubernetes keeps"),
        ("device-class", "gpu.amd.com/x", "must be lower-case"),
        ("rdma-resource", "rdma/hca=0.5", "must have a whole number"),
        ("env", "9LIVES=1", "must be NAME=VALUE"),
        ("env", "HF_TOKEN=typed-by-hand", "add HF_TOKEN to the Secret"),
        ("proxy", "proxy:3128", "must be a URL"),
        ("proxy", "http://me:typed-by-hand@proxy:3128", "contains a password"),
        ("no-proxy", "a b", "must be a host"),
        ("egress-port", "70000", "must be a port"),
        ("ttl", "3d", "must be a whole number of seconds"),
        ("weights", "bucket", "must be one of node, claim, shared"),
        ("device-selector", " ", "must be a CEL expression"),
        ("metrics-from", "a/b", "must be 1 to 63"),
        ("openshift", "yes", "must be true or false"),
        ("runtime-class", "_", "must be lower-case"),
    ],
)
def test_a_value_that_the_cluster_would_refuse_is_refused(
    option: str, value: str, message: str
) -> None:
    with pytest.raises(UsageError, match=f"--{option}: ") as raised:
        read({option: [value]})
    assert message in str(raised.value)
    assert "typed-by-hand" not in str(raised.value)


def test_every_option_has_a_refusal_and_stands_in_the_help() -> None:
    marks = test_a_value_that_the_cluster_would_refuse_is_refused.pytestmark  # type: ignore[attr-defined]
    assert {row[0] for row in marks[0].args[1]} == {*OPTIONS}
    shown = job("manifest", "--help").out
    for name in ("cluster", *OPTIONS):
        assert f"--{name} " in shown, name


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UsageError) as raised:
        read({"namespace": ["A"], "ttl": ["x"], "egress-port": ["0", "1", "y"]})
    assert [problem.field for problem in raised.value.problems] == [
        "--namespace",
        "--ttl",
        "--egress-port",
        "--egress-port",
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"gpu-resource": ["amd.com/x"], "device-class": ["gpu.amd.com"]}, "--gpu-resource: confl"),
        ({"device-selector": ["true"]}, "--device-selector: selects among"),
        ({"no-proxy": ["x"]}, "--no-proxy: lists what a proxy"),
        ({"label": ["a=1", "b=1", "a=2"]}, "--label: gives a two values, '1' and '2'"),
        ({"env": ["A=1", "A=2"]}, "--env: gives A two values"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    texts: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read(texts)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"gpu_resource": ["nvidia.com/mig-3g.40gb"]}, "is not found on nodes of --platform amd"),
        ({"device_class": ["mig.nvidia.com"]}, "is not found on nodes of --platform amd"),
        ({"env": ["JOB_GRACE_SECONDS=5"]}, "--env: is set by the manifest itself"),
        ({"env": ["HF_HOME=/root/hf"]}, "HF_HOME: is outside the pod's writable volumes"),
    ],
)
def test_options_that_do_not_fit_the_manifest_are_refused(
    texts: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        kubernetes.render(options(**texts), "amd")


def test_a_folder_for_both_vendors_takes_no_claims_of_one() -> None:
    with pytest.raises(UsageError, match="--device-class: conflicts with --directory"):
        kubernetes.folder(options(device_class=["gpu.amd.com"]))
    partitioned = kubernetes.folder(options(gpu_resource=["amd.com/cpx_nps4"]))
    assert "amd.com/cpx_nps4" in partitioned["finetune-job.yaml"]
    assert "nvidia.com/gpu" in partitioned["overlays/nvidia/kustomization.yaml"]

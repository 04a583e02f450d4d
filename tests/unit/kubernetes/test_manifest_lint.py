"""Manifests pass the schemas of every supported Kubernetes and the lint rules beyond them.

Each rule finds the failure planted for it.
"""

import copy
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from job.kubernetes import constants, layout
from tests import manifest_lint
from tests.jobs import ROOT, tool
from tests.manifest_lint import schemas
from tests.manifest_lint.resources import value
from tests.manifest_lint.stored import canonical

K8S = ROOT / "k8s"
FILES = sorted(path for path in K8S.rglob("*.yaml") if path.name != layout.KUSTOMIZATION)
OVERLAYS = sorted((K8S / "overlays").iterdir())
REPLICATED = "spec.template.spec.replicatedJobs.0"
VERSIONS = (constants.OLDEST_KUBERNETES, constants.NEWEST_KUBERNETES)


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_the_newest_kubernetes_is_the_newest_that_the_checks_know() -> None:
    assert kubernetes_validate.latest_version().startswith(f"{constants.NEWEST_KUBERNETES}.")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(K8S)))
def test_every_manifest_is_valid_by_the_schema(path: Path, version: str) -> None:
    for document in documents(path):
        schemas.check(document, version)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(K8S)))
def test_every_manifest_passes_the_rules(path: Path) -> None:
    found = documents(path)
    # The question needs the server, which is in a file of its own.
    if path.name == layout.SMOKE:
        found += documents(K8S / layout.SERVER)
    assert manifest_lint.problems(found) == []


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_every_overlay_as_kustomize_builds_it_is_valid_and_passes_the_rules(overlay: Path) -> None:
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(overlay)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    for version in VERSIONS:
        for document in found:
            schemas.check(document, version)
    assert manifest_lint.problems(found) == []


@pytest.mark.parametrize(
    ("kind", "key", "wrong"),
    [
        ("Job", "spec.backofLimit", 3),
        ("Job", "spec.backoffLimit", "three"),
        ("Job", "spec.template.spec.containers.0.volumeMount", []),
        ("NetworkPolicy", "spec.egres", []),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteOnce"),
        ("TrainingRuntime", f"{REPLICATED}.template.spec.backofLimit", 3),
        ("TrainingRuntime", f"{REPLICATED}.name", "a-name-of-21-letters-x"),
        ("TrainingRuntime", f"{REPLICATED}.template", None),
        ("TrainingRuntime", "spec.mlPolicy.torch.numProcPerNode", 1),
        ("TrainingRuntime", "spec.mlPolicy.numNodes", "2"),
        ("TrainingRuntime", "spec.mlPolicies", {}),
        ("TrainJob", "spec.trainer.numNode", 2),
        ("TrainJob", "spec.trainer.numProcPerNode", "auto"),
        ("TrainJob", "spec.trainer.numNodes", 2.5),
        ("TrainJob", "spec.runtimeRef.name", None),
        ("TrainJob", "spec.runtimeRef", None),
        ("TrainJob", "spec.podTemplateOverrides", []),
        ("TrainJob", "metadata.name", "4bit"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_finds_wrong_names_and_types(
    kind: str, key: str, wrong: object, version: str
) -> None:
    path = K8S / (layout.TRAINJOB if kind.startswith("Train") else layout.JOB)
    [document] = [found for found in documents(path) if found["kind"] == kind]
    put(document, key, wrong)
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        schemas.check(document, version)


# --- planted failures -----------------------------------------------------------------------


def put(document: Any, key: str, value: object) -> None:
    """Sets the value at a dotted key; deletes the key if the value is None."""
    *above, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    for part in above:
        document = document[part]
    if value is None:
        del document[last]
    elif isinstance(document, list) and last == len(document):
        document.append(value)
    else:
        document[last] = value


POD = "spec.template.spec"
BOX = f"{POD}.containers.0"
RULE = "spec.podFailurePolicy.rules"

# file, kind, dotted key, planted value, what the message says
PLANTED: list[tuple[str, str, str, object, str]] = [
    (layout.JOB, "Job", f"{POD}.restartPolicy", "OnFailure", "restartPolicy must be Never"),
    (
        layout.SERVER,
        "Deployment",
        f"{POD}.restartPolicy",
        "Never",
        "must be Always in a Deployment",
    ),
    (layout.JOB, "Job", "spec.backoffLimit", 0, "backoffLimit must be 1 or more"),
    (layout.JOB, "Job", f"{BOX}.env", [{"name": "A"}, {"name": "A"}], "has a variable twice"),
    (
        layout.JOB,
        "Job",
        f"{RULE}.2.onExitCodes.values",
        [2, 10, 11, 12, 13, 20, 30],
        "never has: [13]",
    ),
    (
        layout.JOB,
        "Job",
        f"{RULE}.2.onExitCodes.values",
        [2, 10, 11, 12, 20],
        "retries permanent errors of job: [30]",
    ),
    (
        layout.JOB,
        "Job",
        f"{RULE}.1.onExitCodes.values",
        [10, 143],
        "retries permanent errors: [10]",
    ),
    (layout.JOB, "Job", f"{RULE}.2.onExitCodes.values", [10, 2, 11, 12, 20, 30], "in order"),
    (layout.JOB, "Job", f"{RULE}.2.onExitCodes.containerName", "main", "names no container: main"),
    (layout.JOB, "Job", f"{RULE}.4", None, "permanent errors of doctor: [2, 10, 11"),
    (layout.JOB, "Job", f"{RULE}.0.action", "Count", "counts a node disruption"),
    (
        layout.JOB,
        "Job",
        f"{RULE}.0.onPodConditions",
        None,
        "one of onExitCodes and onPodConditions",
    ),
    (layout.JOB, "Job", RULE, [{"action": "Ignore"}] * 21, "21 rules, and 20 are the most"),
    (
        layout.JOB,
        "Job",
        "spec.podReplacementPolicy",
        "TerminatingOrFailed",
        "must be Failed beside",
    ),
    (layout.JOB, "Job", f"{BOX}.resources.limits.memory", "78GiB", "'78GiB' is no quantity"),
    (layout.JOB, "Job", f"{BOX}.resources.limits.memory", "70Gi", "requests more memory"),
    (
        layout.JOB,
        "Job",
        f"{BOX}.resources.limits.memory",
        None,
        "memory needs a request and a limit",
    ),
    (layout.JOB, "Job", f"{BOX}.resources.limits.amd~com/gpu", "2", "in both alike"),
    (
        layout.JOB,
        "Job",
        f"{POD}.tolerations.0.key",
        "nvidia.com/gpu",
        "does not tolerate the taint",
    ),
    (layout.JOB, "Job", f"{POD}.volumes.4.emptyDir.sizeLimit", "400Gi", "larger than its memory"),
    (layout.JOB, "Job", f"{POD}.volumes.4.emptyDir.sizeLimit", None, "memory without an end"),
    (layout.JOB, "Job", f"{BOX}.volumeMounts.1.name", "cash", "mounts cash, which is no volume"),
    (layout.JOB, "Job", f"{BOX}.volumeMounts.1.mountPath", "/work", "two volumes at one path"),
    (layout.JOB, "Job", f"{POD}.volumes.5", {"name": "x", "emptyDir": {}}, "nothing mounts: ['x']"),
    (layout.JOB, "Job", f"{POD}.volumes.0.configMap.name", "other", "there is no ConfigMap/other"),
    (layout.JOB, "Job", f"{POD}.serviceAccountName", "other", "there is no ServiceAccount/other"),
    (layout.JOB, "Job", f"{POD}.securityContext.runAsNonRoot", None, "a user other than root"),
    (layout.JOB, "Job", f"{POD}.securityContext.runAsUser", 0, "a user other than root"),
    (layout.JOB, "Job", f"{POD}.securityContext.seccompProfile", None, "needs a seccompProfile"),
    (layout.JOB, "Job", f"{POD}.hostNetwork", True, "hostNetwork is not allowed"),
    (layout.JOB, "Job", f"{BOX}.securityContext.runAsUser", 0, "job must run as a user other than"),
    (layout.JOB, "Job", f"{BOX}.securityContext.runAsNonRoot", False, "job must run as a user"),
    (
        layout.JOB,
        "Job",
        f"{BOX}.securityContext.seccompProfile",
        {"type": "Unconfined"},
        "job has no seccompProfile",
    ),
    (layout.JOB, "Job", f"{BOX}.securityContext.capabilities.add", ["SYS_PTRACE"], "adds capabil"),
    (layout.JOB, "Job", f"{BOX}.securityContext.capabilities", {}, "keeps capabilities"),
    (layout.SERVER, "Deployment", f"{BOX}.ports.0.hostPort", 8000, "takes a port of its node"),
    (layout.JOB, "Job", f"{BOX}.securityContext.allowPrivilegeEscalation", True, "gain privileges"),
    (
        layout.JOB,
        "Job",
        f"{BOX}.securityContext.readOnlyRootFilesystem",
        None,
        "write to its image",
    ),
    (
        layout.JOB,
        "Job",
        f"{BOX}.env.0",
        {"name": "HF_HOME", "value": "/root"},
        "nothing can be written",
    ),
    (layout.JOB, "Job", f"{BOX}.image", "registry.example.com/job:latest", "other than latest"),
    (layout.JOB, "Job", f"{BOX}.image", "finetune-job:1", "needs a registry"),
    (layout.JOB, "Job", "metadata.name", "ERNIE_4.5", "lower-case letters"),
    (layout.JOB, "Job", "metadata.labels.x", "a b", "labels cannot have"),
    (layout.JOB, "Job", f"{BOX}.name", "Job", "container Job: the name must be"),
    (layout.JOB, "Job", f"{BOX}.name", "doctor", "two of its containers have one name"),
    (layout.JOB, "Job", f"{POD}.volumes.1.name", "work", "two of its volumes have one name"),
    (layout.SERVER, "Deployment", f"{BOX}.ports.0.name", "openai-compatible", "port openai-compat"),
    (layout.SERVER, "Service", "metadata.name", "4bit", "must begin with a letter"),
    (layout.JOB, "PersistentVolumeClaim", "spec.accessModes", [], "accessModes must name one"),
    (layout.JOB, "PersistentVolumeClaim", "spec.resources", {}, "needs a request for storage"),
    (
        layout.JOB,
        "PersistentVolumeClaim",
        "spec.resources.requests.storage",
        "0Gi",
        "asks for no storage",
    ),
    (layout.JOB, "NetworkPolicy", "spec.podSelector.matchLabels.x", "y", "selects no pod"),
    (layout.SERVER, "Deployment", "spec.selector.matchLabels.x", "y", "select its own pods"),
    (layout.SERVER, "Service", "spec.selector.x", "y", "selects no pod"),
    (layout.SERVER, "Service", "spec.ports.0.targetPort", "web", "no pod has port web"),
    (layout.SERVER, "Deployment", f"{BOX}.livenessProbe.httpGet.port", "web", "asks port web"),
    (
        layout.SERVER,
        "Deployment",
        "spec.progressDeadlineSeconds",
        None,
        "600, and vllm may take 1800",
    ),
    (layout.TRAINJOB, "TrainJob", "spec.runtimeRef.name", "other", "no TrainingRuntime/other"),
    (layout.TRAINJOB, "TrainJob", "spec.trainer.numNodes", 3, "3 nodes, and its runtime says 2"),
    (layout.JOB, "NetworkPolicy", "spec.ingress", [], "spec.ingress is empty, and servers drop"),
    (layout.JOB, "Job", "metadata.annotations", {}, "metadata.annotations is empty"),
    (layout.JOB, "Job", "metadata.creationTimestamp", "2026-11-29", "is the server's to set"),
    (layout.JOB, "Job", "status", {}, "status is the server's to set"),
    (layout.JOB, "Job", f"{BOX}.volumeMounts.1.readOnly", False, "readOnly is false, which serv"),
    (layout.SERVER, "Deployment", "spec.minReadySeconds", 0, "minReadySeconds is zero"),
    (layout.JOB, "Job", f"{BOX}.resources.requests.cpu", "8000m", "store as '8'"),
    (layout.JOB, "Job", f"{BOX}.resources.requests.cpu", 8, "is 8, which servers store as '8'"),
    (layout.JOB, "Job", f"{POD}.volumes.2.emptyDir.sizeLimit", "2048Mi", "store as '2Gi'"),
    (
        layout.TRAINJOB,
        "TrainingRuntime",
        f"{REPLICATED}.template.metadata.labels",
        {},
        "no job has",
    ),
    (
        layout.TRAINJOB,
        "TrainingRuntime",
        f"{REPLICATED}.template.spec.template.spec.containers.0.name",
        "main",
        "no container node",
    ),
]


@pytest.mark.parametrize(
    ("name", "kind", "key", "planted", "message"),
    PLANTED,
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_a_planted_failure_is_found(
    name: str, kind: str, key: str, planted: object, message: str
) -> None:
    found = copy.deepcopy(documents(K8S / name))
    [document] = [document for document in found if document["kind"] == kind]
    # The dot in a resource's name is no step down.
    if "amd~com" in key:
        document["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"][
            "amd.com/gpu"
        ] = planted
    else:
        put(document, key, planted)
    assert any(message in line for line in manifest_lint.problems(found)), manifest_lint.problems(
        found
    )


def test_volumes_of_the_host_are_refused() -> None:
    found = documents(K8S / layout.JOB)
    volumes = found[-1]["spec"]["template"]["spec"]["volumes"]
    volumes[2] = {"name": volumes[2]["name"], "hostPath": {"path": "/"}}
    assert any("not allowed: ['hostPath']" in line for line in manifest_lint.problems(found))


def test_two_objects_of_one_name_are_found() -> None:
    found = documents(K8S / layout.JOB)
    assert any("appears twice" in line for line in manifest_lint.problems([*found, found[0]]))


@pytest.mark.parametrize(
    ("quantity", "number"), [("500m", 0.5), ("2", 2), ("1Gi", 2**30), ("1.5k", 1500)]
)
def test_quantities_are_read(quantity: str, number: float) -> None:
    assert value(quantity) == number


@pytest.mark.parametrize(
    ("quantity", "stored"),
    [
        *(("1000m", "1"), ("0.5", "500m"), ("1500m", "1500m"), ("1.5k", "1500"), ("2000", "2k")),
        *(("1024Gi", "1Ti"), ("1000Gi", "1000Gi"), ("1.5Gi", "1536Mi"), ("0Gi", "0"), ("8", "8")),
    ],
)
def test_servers_store_a_quantity_in_the_largest_whole_unit(quantity: str, stored: str) -> None:
    assert canonical(quantity) == stored
    assert canonical(stored) == stored


@pytest.mark.parametrize("quantity", ["1GB", "-1", "1 Gi", "Gi", "1e3x", ""])
def test_what_is_no_quantity_is_refused(quantity: str) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        value(quantity)

"""The files in k8s/ are what `job manifest` writes, and match the spec and the exit codes."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from job import errors, kubernetes, planning, signals
from job.distributed.world import World
from job.errors import JobError, SpecError, UsageError
from job.kubernetes import cache_volume, constants, features, overlays, resources, trainjob
from job.kubernetes.options import ManifestOptions
from job.kubernetes.platforms import PLATFORMS
from job.planning import requirements
from job.planning.sizes import GIB, Sizes, measure
from job.spec.load import load_spec
from tests import manifest_lint
from tests.jobs import ROOT, job, tool

K8S = ROOT / "k8s"
ERNIE, LATEX = "specs/ernie-4.5-vl-28b-latex.yaml", "specs/latex.yaml"


@pytest.fixture(scope="module", autouse=True)
def _from_the_root() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def ernie() -> ManifestOptions:
    return ManifestOptions(spec=ERNIE, environ={})


def documents(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def one(text: str, kind: str) -> Any:
    [found] = [document for document in documents(text) if document["kind"] == kind]
    return found


def pod_of(text: str) -> Any:
    return one(text, "Job")["spec"]["template"]["spec"]


def container_of(text: str) -> Any:
    return pod_of(text)["containers"][0]


# --- the folder -----------------------------------------------------------------------------


def test_the_folder_is_what_the_command_writes(ernie: ManifestOptions) -> None:
    written = kubernetes.folder(ernie, smoke=LATEX)
    there = {str(path.relative_to(K8S)) for path in K8S.rglob("*.yaml")}
    assert there == set(written), "make manifests"
    for path, text in written.items():
        assert (K8S / path).read_text(encoding="utf-8") == text, f"{path}: make manifests"


def kustomized(path: str | Path) -> list[Any]:
    done = subprocess.run([tool("kubectl"), "kustomize", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted(documents(done.stdout), key=lambda found: str(found["kind"]))


def rendered(*texts: str) -> list[Any]:
    found = [document for text in texts for document in documents(text)]
    return sorted(found, key=lambda document: str(document["kind"]))


def test_overlays_give_what_the_command_renders(ernie: ManifestOptions) -> None:
    job = kubernetes.render(ernie, "amd")
    assert kustomized(K8S / "base") == rendered(job)
    assert kustomized(K8S / "overlays/nvidia") == rendered(kubernetes.render(ernie, "nvidia"))
    served = kubernetes.render(ernie, "nvidia", kind="vllm")
    assert kustomized(K8S / "overlays/vllm-nvidia") == rendered(served)
    smoke = kubernetes.render(ManifestOptions(spec=LATEX, environ={}), "cpu")
    assert kustomized(K8S / "overlays/cpu-smoke") == rendered(smoke)
    for name, feature in features.FEATURES.items():
        wanted = features.apply(feature, rendered(job))
        assert kustomized(K8S / "overlays" / name) == wanted


def test_components_go_with_any_overlay(tmp_path: Path, ernie: ManifestOptions) -> None:
    (tmp_path / "k8s").mkdir()
    kubernetes.write(tmp_path / "k8s", kubernetes.folder(ernie))
    mine = tmp_path / "mine"
    mine.mkdir()
    parts = {
        "resources": ["../k8s/overlays/nvidia", "../k8s/overlays/vllm-nvidia"],
        "components": ["../k8s/components/kueue", "../k8s/components/s3-workload-identity"],
    }
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    found = {document["kind"]: document for document in kustomized(mine)}
    # Kueue's webhook suspends what has the label; in a manifest it would kill a running job's pod.
    assert found["Job"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == features.QUEUE
    assert "suspend" not in found["Job"]["spec"]
    pod = found["Job"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    fetching = found["Deployment"]["spec"]["template"]["spec"]["initContainers"][0]
    for container in (pod["containers"][0], pod["initContainers"][0], fetching):
        assert "envFrom" not in container
        assert any(variable["name"] == "AWS_ROLE_ARN" for variable in container["env"])


def test_a_pinned_kustomization_is_what_the_command_renders(
    tmp_path: Path, ernie: ManifestOptions
) -> None:
    """What a platform team keeps: a base at a tag of a repository, and what differs here."""
    repository, mine = tmp_path / "finetune-job", tmp_path / "mine"
    mine.mkdir()
    kubernetes.write(repository / "k8s", kubernetes.folder(ernie))
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "v0.1.0"]):
        subprocess.run([*git, *command], check=True)
    # Later changes are not seen by whoever pinned the tag.
    (repository / "k8s/base/finetune-job.yaml").write_text("")
    subprocess.run([*git, "commit", "-qam", "y"], check=True)
    (mine / "kustomization.yaml").write_text(f"""
resources:
  - file://{repository}//k8s/base?ref=v0.1.0
namespace: team-ocr
images:
  - name: registry.example.com/finetune-job
    newName: registry.team.example/ml/finetune-job
labels:
  - pairs: {{team: ocr}}
    includeTemplates: true
""")
    asked = ManifestOptions(
        spec=ERNIE,
        registry="registry.team.example/ml",
        cluster=kubernetes.Cluster(namespace="team-ocr", labels={"team": "ocr"}),
        environ={},
    )
    assert kustomized(mine) == rendered(kubernetes.render(asked, "amd"))


def test_components_go_with_a_trainjob(tmp_path: Path, ernie: ManifestOptions) -> None:
    kubernetes.write(tmp_path / "k8s", kubernetes.folder(ernie))
    for name, feature in features.FEATURES.items():
        mine = tmp_path / name
        mine.mkdir()
        parts = {"resources": ["../k8s/trainjob"], "components": [f"../k8s/components/{name}"]}
        (mine / "kustomization.yaml").write_text(yaml.safe_dump(parts))
        bundle = rendered(kubernetes.render(ernie, "amd", nodes=2))
        found = kustomized(mine)
        assert found == features.apply(feature, bundle)
        assert found != bundle
        assert manifest_lint.problems(found) == []
    [queued] = [each for each in kustomized(tmp_path / "kueue") if each["kind"] == "TrainJob"]
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == features.QUEUE
    assert "suspend" not in queued["spec"]


def test_workload_identity_keeps_what_else_the_secret_may_hold(tmp_path: Path) -> None:
    """It replaces the whole Secret, in which proxies with passwords and the spec's tokens are."""
    spec = tmp_path / "spec.yaml"
    text = (ROOT / LATEX).read_text()
    spec.write_text(f"{text}\nruntime: {{metrics_file: '/metrics/${{RUN_TOKEN}}'}}\n")
    asked = ManifestOptions(
        spec=str(spec),
        output="s3://b/x",
        cluster=kubernetes.Cluster(env={"AWS_REGION": "eu-central-1"}),
        environ={"RUN_TOKEN": "kept-in-the-secret"},
    )
    kubernetes.write(tmp_path / "k8s", kubernetes.folder(asked))
    [job] = [
        each
        for each in kustomized(tmp_path / "k8s/overlays/s3-workload-identity")
        if each["kind"] == "Job"
    ]
    for container in job["spec"]["template"]["spec"]["containers"]:
        names = [variable["name"] for variable in container["env"]]
        assert {"HTTPS_PROXY", "AWS_ENDPOINT_URL_S3", "RUN_TOKEN", "HF_TOKEN"} <= {*names}
        assert len(names) == len({*names})  # servers refuse a name that is there twice
        assert {"name": "AWS_REGION", "value": "eu-central-1"} in container["env"]


def test_patches_add_to_lists_at_their_end() -> None:
    before = {"apiVersion": "v1", "kind": "X", "env": [{"a": 1}, {"b": 2}], "gone": 1}
    after = {"apiVersion": "v1", "kind": "X", "env": [{"a": 9}, {"b": 2}, {"c": 3}], "a/b": 4}
    [patch] = overlays.between([before], [after])
    assert patch["target"] == {"version": "v1", "kind": "X"}
    assert patch["patch"] == [
        {"op": "replace", "path": "/env/0/a", "value": 9},
        {"op": "add", "path": "/env/-", "value": {"c": 3}},
        {"op": "remove", "path": "/gone"},
        {"op": "add", "path": "/a~1b", "value": 4},
    ]


# --- the job --------------------------------------------------------------------------------


def test_each_exit_code_has_one_policy(ernie: ManifestOptions) -> None:
    job = one(kubernetes.render(ernie, "amd"), "Job")["spec"]
    by_container: dict[str, dict[str, list[int]]] = {constants.CONTAINER: {}, constants.DOCTOR: {}}
    for rule in job["podFailurePolicy"]["rules"][1:]:
        exits = rule["onExitCodes"]
        by_container[exits["containerName"]][rule["action"]] = exits["values"]
    for by_action in by_container.values():
        assert by_action == {"Ignore": [errors.STOPPED], "FailJob": [2, 10, 11, 12, 20, 30]}
        counted = {errors.StorageError.exit_code, errors.INTERNAL}
        assert not counted & {code for codes in by_action.values() for code in codes}
    assert job["backoffLimit"] == constants.RETRIES
    disruption = {"type": "DisruptionTarget", "status": "True"}
    assert job["podFailurePolicy"]["rules"][0] == {
        "action": "Ignore",
        "onPodConditions": [disruption],
    }


def test_requests_are_those_of_the_sizes(ernie: ManifestOptions) -> None:
    sizes = ernie.sizes
    assert sizes.parameters == 29_399_294_336
    found = requirements.needs(ernie.loaded.spec, sizes, gpus=1)
    container = container_of(kubernetes.render(ernie, "amd"))
    assert container["resources"]["requests"] == {
        "cpu": "8",
        "memory": resources.quantity(found.memory),
        "ephemeral-storage": resources.quantity(found.ephemeral),
        "amd.com/gpu": "1",
    }
    assert found.memory > sizes.merged + found.shared_memory
    assert sizes.merged < found.work < 2 * sizes.merged
    assert sizes.download < found.cache < sizes.download + sizes.merged


def test_a_result_on_the_cache_volume_takes_space_once_and_there(ernie: ManifestOptions) -> None:
    """Its work folder is there too, so that it is linked."""
    local = replace(ernie, output="/cache/outputs/run")
    remote, found = (
        requirements.needs(ernie.loaded.spec, ernie.sizes, gpus=1, output=output)
        for output in ("s3://bucket/run", local.output)
    )
    merged = ernie.sizes.merged
    assert remote.cache + merged < found.cache < remote.cache + 1.9 * merged
    assert found.work <= GIB
    for options, work in ((local, "/cache/work"), (ernie, "/work")):
        assert (
            f"--set=runtime.workdir={work}"
            in container_of(kubernetes.render(options, "amd"))["args"]
        )


def test_the_plan_tells_what_a_manifest_asks_for() -> None:
    options = ManifestOptions(spec=LATEX, environ={})
    plan = planning.make_plan(planning.PlanOptions(loaded=options.loaded))
    lines = planning.text(plan).splitlines()
    for platform, name in (("amd", "with a GPU"), ("cpu", "on CPUs")):
        [line] = [line for line in lines if line.startswith(f"  {name} ")]
        text = kubernetes.render(options, platform)
        asked = container_of(text)["resources"]["requests"]
        for quantity in (asked["memory"], asked["ephemeral-storage"]):
            assert f" {quantity.removesuffix('Gi')}.0 GiB " in line, (quantity, line)
        gpus = PLATFORMS[platform].gpus
        cache = requirements.needs(options.loaded.spec, options.sizes, gpus=gpus).cache
        assert f" {cache // GIB}.0 GiB cache" in line
        volume = one(text, "PersistentVolumeClaim")["spec"]["resources"]["requests"]["storage"]
        assert volume == resources.quantity(cache_volume.size_class(cache))


@pytest.mark.parametrize("rows", [32, 1024])
def test_a_pod_without_a_gpu_has_the_memory_that_training_takes(rows: int) -> None:
    """Rows of a batch count: a pod with less is silently killed by the kernel."""
    sets = ("runtime.accelerator=cpu", f"train.per_device_train_batch_size={rows}")
    options = ManifestOptions(spec=LATEX, sets=sets, environ={})
    made = planning.make_plan(planning.PlanOptions(loaded=options.loaded))
    assert made.memory is not None
    [training] = made.memory.fits
    [pod] = [pod for pod in made.pods if pod.name == "on CPUs"]
    assert pod.memory >= training.at_max_length + pod.shared_memory
    assert training.at_max_length > training.total
    asked = container_of(kubernetes.render(options, "cpu"))["resources"]["requests"]["memory"]
    assert asked == resources.quantity(pod.memory)


@pytest.mark.parametrize("checkpoint", [2_000_000, 136_000_000, 350_000_000_000])
def test_the_grace_period_is_longer_than_a_save(checkpoint: int) -> None:
    spec = load_spec((ROOT / LATEX).read_text(), "latex", environ={}).spec
    sizes = Sizes(parameters=1, trainable=1, download=0, adapter=4, checkpoint=checkpoint, merged=2)
    found = requirements.needs(spec, sizes, gpus=1)
    assert found.grace_seconds > found.save_seconds + 60
    assert found.save_seconds > checkpoint / requirements.UPLOAD_RATE


def test_the_spec_reaches_the_cluster_as_written_and_loads_there(ernie: ManifestOptions) -> None:
    text = kubernetes.render(ernie, "amd")
    spec = one(text, "ConfigMap")["data"][constants.SPEC_FILE]
    assert spec == (ROOT / ERNIE).read_text(encoding="utf-8")
    container = container_of(text)
    environ = {variable["name"]: variable["value"] for variable in container["env"]}
    sets = [arg.removeprefix("--set=") for arg in container["args"] if arg.startswith("--set=")]
    loaded = load_spec(spec, "spec.yaml", sets, environ).spec
    assert loaded.runtime.accelerator == "rocm"
    assert (loaded.runtime.cache_dir, loaded.runtime.workdir) == (constants.CACHE, constants.WORK)
    assert loaded.output.uri == "s3://my-bucket/ernie-4.5-vl-28b-latex"


def test_the_environment_and_overrides_of_the_command_reach_the_pod() -> None:
    options = ManifestOptions(
        spec=ERNIE, environ={"BUCKET": "mine", "HF_TOKEN": "secret-token"}, sets=("lora.r=4",)
    )
    text = kubernetes.render(options, "nvidia")
    container = container_of(text)
    assert {"name": "BUCKET", "value": "mine"} in container["env"]
    assert "--set=lora.r=4" in container["args"]
    assert "secret-token" not in text


def test_dollars_reach_the_job_as_written_and_the_smoke_job_asks_as_it_evaluates() -> None:
    instruction = "Give $$x$$, not $(BUCKET) or \\$5 or $$$(y)."
    escaped = "Give $$$$x$$$$, not $$(BUCKET) or \\$5 or $$$$$$(y)."
    sets = (
        f"data.instruction={instruction}",
        "data.system=For $$5.",
        "eval.generation.enable_thinking=true",
        "output.uri=s3://${BUCKET}/out",
    )
    options = ManifestOptions(spec=LATEX, environ={"BUCKET": "a$(b)"}, sets=sets)
    container = container_of(kubernetes.render(options, "cpu"))
    assert f"--set=data.instruction={escaped}" in container["args"]
    assert "--set=output.uri=s3://${BUCKET}/out" in container["args"]
    asked = container_of(kubernetes.render(options, "cpu", kind="vllm-smoke"))
    assert f"--question={escaped}" in asked["args"]
    assert "--system=For $$$$5." in asked["args"], "the server gets what training added"
    assert "--enable-thinking" in asked["args"], "it is asked as in the evaluation"


def test_secrets_that_a_spec_names_are_left_to_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    spec = (
        (ROOT / LATEX)
        .read_text()
        .replace("uri: ${OUTPUT,outputs/latex}", "uri: s3://b/${MY_TOKEN}")
    )
    path.write_text(spec)
    options = ManifestOptions(spec=str(path), environ={"MY_TOKEN": "abcdefgh"})
    text = kubernetes.render(options, "cpu")
    assert "abcdefgh" not in text
    assert {"secretRef": {"name": constants.SECRET, "optional": True}} in container_of(text)[
        "envFrom"
    ]


@pytest.mark.parametrize(
    ("kind", "key", "written", "with_a_secret"),
    [
        ("vllm", "output.uri", "uri: ${OUTPUT,outputs/latex}", "uri: s3://b/${MY_TOKEN}"),
        (
            "vllm-smoke",
            "data.instruction",
            ": Write the LaTeX representation for this image.",
            ": say ${MY_TOKEN}",
        ),
    ],
)
def test_what_would_show_a_secret_is_refused(
    kind: str, key: str, written: str, with_a_secret: str, tmp_path: Path
) -> None:
    path, spec = tmp_path / "spec.yaml", (ROOT / LATEX).read_text()
    assert spec.count(written) == 1
    path.write_text(spec.replace(written, with_a_secret))
    options = ManifestOptions(
        spec=str(path), environ={"MY_TOKEN": "abcdefgh", "OUTPUT": "s3://b/run"}
    )
    with pytest.raises(SpecError, match=rf"\$\.{key}: contains MY_TOKEN, a secret") as raised:
        kubernetes.render(options, "cpu", 1, kind)
    assert "abcdefgh" not in str(raised.value)


def test_the_doctor_looks_at_what_the_job_will_use(ernie: ManifestOptions) -> None:
    for platform in ("amd", "nvidia", "cpu"):
        pod = pod_of(kubernetes.render(ernie, platform))
        [doctor], [container] = pod["initContainers"], pod["containers"]
        assert doctor["args"][1] == "doctor"
        assert [arg for arg in doctor["args"] if arg != "doctor"] == [
            arg for arg in container["args"] if arg != "run"
        ]
        for key in ("image", "env", "envFrom", "resources", "securityContext", "volumeMounts"):
            assert doctor[key] == container[key]


def test_the_job_knows_the_grace_period_of_its_pod(ernie: ManifestOptions) -> None:
    pod = pod_of(kubernetes.render(ernie, "amd"))
    seconds = str(pod["terminationGracePeriodSeconds"])
    assert {"name": signals.GRACE_VARIABLE, "value": seconds} in pod["containers"][0]["env"]


def test_a_port_for_metrics_is_opened_and_nothing_else(ernie: ManifestOptions) -> None:
    closed = kubernetes.render(ernie, "amd")
    assert "ingress" not in one(closed, "NetworkPolicy")["spec"]
    assert "Ingress" in one(closed, "NetworkPolicy")["spec"]["policyTypes"]
    assert "ports" not in container_of(closed)
    options = ManifestOptions(spec=LATEX, sets=("runtime.metrics_port=9464",), environ={})
    text = kubernetes.render(options, "cpu")
    assert container_of(text)["ports"] == [{"name": "metrics", "containerPort": 9464}]
    assert "ports" not in pod_of(text)["initContainers"][0]
    [rule] = one(text, "NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"port": 9464, "protocol": "TCP"}]


def test_a_trainjob_of_one_node_runs_and_reaches_the_trainer() -> None:
    options = ManifestOptions(spec=LATEX, sets=("output.uri=s3://b/x",), environ={})
    text = kubernetes.render(options, "cpu", kind="trainjob")
    assert one(text, "TrainJob")["spec"]["trainer"]["numNodes"] == 1
    egress = one(text, "NetworkPolicy")["spec"]["egress"]
    assert {"ports": [{"port": constants.TRAINER_PORT, "protocol": "TCP"}]} in egress
    # The Trainer hears pods that carry this label.
    [replicated] = one(text, "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["spec"]["template"]["metadata"]["labels"]
    assert labels[trainjob.ANCESTOR] == "trainer"


def test_results_for_a_local_folder_go_to_the_volume() -> None:
    container = container_of(kubernetes.render(ManifestOptions(spec=LATEX, environ={}), "cpu"))
    assert "--output=/cache/outputs/latex" in container["args"]
    assert [variable["name"] for variable in container["env"]] == [signals.GRACE_VARIABLE]


def test_a_cpu_pod_asks_for_no_device_and_runs_where_all_nodes_have_one(
    ernie: ManifestOptions,
) -> None:
    latex = ManifestOptions(spec=LATEX, environ={})
    pod = pod_of(kubernetes.render(latex, "cpu"))
    assert "supplementalGroups" not in pod["securityContext"]
    assert not [name for name in pod["containers"][0]["resources"]["limits"] if "/" in name]
    asking = pod_of(kubernetes.render(ernie, "amd", kind="vllm-smoke"))
    for tolerations in (pod["tolerations"], asking["tolerations"]):
        assert {each["key"] for each in tolerations} == {"amd.com/gpu", "nvidia.com/gpu"}


def test_several_nodes_keep_the_policy_of_one(ernie: ManifestOptions) -> None:
    text = kubernetes.render(ernie, "amd", nodes=4)
    assert one(text, "TrainJob")["spec"]["trainer"] == {"numNodes": 4, "numProcPerNode": 1}
    runtime = one(text, "TrainingRuntime")["spec"]
    assert runtime["mlPolicy"]["numNodes"] == 4
    [replicated] = runtime["template"]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert replicated["name"] == container["name"] == "node"
    named = {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"][1:]}
    assert named == {"node", constants.DOCTOR}
    claim = one(text, "PersistentVolumeClaim")["spec"]
    assert claim["accessModes"] == ["ReadWriteMany"]


def test_every_process_of_several_nodes_may_fail_as_often_as_one(ernie: ManifestOptions) -> None:
    for nodes in (1, 4):
        text = kubernetes.render(ernie, "amd", nodes, "trainjob")
        [replicated] = one(text, "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
        assert replicated["template"]["spec"]["backoffLimit"] == nodes * constants.RETRIES


def test_the_pods_of_several_nodes_are_told_their_places_by_the_trainer(
    ernie: ManifestOptions,
) -> None:
    text = kubernetes.render(ernie, "amd", nodes=2)
    [replicated] = one(text, "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    container = replicated["template"]["spec"]["template"]["spec"]["containers"][0]
    assert "command" not in container  # no launcher, so that exit codes reach the policy
    # As the Trainer's torch plugin sets them for one process a node.
    trainer_sets = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": str(one(text, "TrainJob")["spec"]["trainer"]["numProcPerNode"]),
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "job-node-0-0.job",
        "PET_MASTER_PORT": "29400",
    }
    here = World.from_environment(
        {**{v["name"]: v.get("value", "") for v in container["env"]}, **trainer_sets}
    )
    assert (here.rank, here.size) == (1, 2)


@pytest.mark.parametrize(("distributed", "nodes"), [("none", 2), ("ddp", 1), ("fsdp2", 1)])
def test_nodes_that_the_job_would_refuse_are_not_rendered(distributed: str, nodes: int) -> None:
    sets = ("output.uri=s3://b/x", f"runtime.distributed={distributed}")
    with pytest.raises(UsageError, match=r"--nodes: conflicts with runtime\.distributed"):
        kubernetes.render(ManifestOptions(spec=LATEX, sets=sets, environ={}), "amd", nodes)


def test_the_server_fetches_what_the_job_writes(ernie: ManifestOptions) -> None:
    served = one(kubernetes.render(ernie, "nvidia", kind="vllm"), "Deployment")
    pod = served["spec"]["template"]["spec"]
    assert ernie.loaded.spec.output.uri in pod["initContainers"][0]["args"]
    assert pod["containers"][0]["image"].startswith("docker.io/vllm/vllm-openai:v")
    smoke = container_of(kubernetes.render(ernie, "amd", kind="vllm-smoke"))
    assert f"http://{served['metadata']['name']}:{constants.VLLM_PORT}" in smoke["args"]
    assert f"--served-model-name={ernie.loaded.spec.name}" in pod["containers"][0]["args"]
    assert f"--model={ernie.loaded.spec.name}" in smoke["args"]


# --- the cache's claim, and images ----------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "size"),
    [(1, "10Gi"), (10, "10Gi"), (135, "200Gi"), (501, "1Ti"), (3000, "5Ti"), (5121, "10Ti")],
)
def test_a_claim_has_the_smallest_class_that_fits(needed: int, size: str) -> None:
    found = cache_volume.of_job("a", needed * GIB, nodes=1)
    assert (found.claim, found.size) == (
        f"a-cache-{size.lower()}",
        cache_volume.size_class(needed * GIB),
    )
    assert resources.quantity(found.size or 0) == size


def test_no_manifest_shrinks_a_claim_that_another_of_the_name_made() -> None:
    """A claim's request may only grow, and its access modes stay: else `kubectl apply` fails."""
    requests: dict[str, set[object]] = {}
    for model in (ERNIE, LATEX):
        for nodes in (1, 2):
            sets = ("name=same", "output.uri=s3://b/x")
            options = ManifestOptions(spec=model, sets=sets, environ={})
            claim = one(kubernetes.render(options, "amd", nodes), "PersistentVolumeClaim")
            requests.setdefault(claim["metadata"]["name"], set()).add(str(claim["spec"]))
    assert {len(specs) for specs in requests.values()} == {1}
    assert len(requests) == 4


def test_a_claim_is_grown_under_its_name() -> None:
    options = ManifestOptions(spec=LATEX, cache_size="1024Gi", environ={})
    text = kubernetes.render(options, "cpu")
    claim = one(text, "PersistentVolumeClaim")
    assert claim["metadata"]["name"] == "latex-cache-10gi"
    assert claim["spec"]["resources"]["requests"]["storage"] == "1Ti"
    assert manifest_lint.problems(documents(text)) == []


def test_an_existing_claim_is_used_and_not_rendered() -> None:
    options = ManifestOptions(spec=LATEX, cache_claim="team-cache", environ={})
    text = kubernetes.render(options, "cpu")
    assert "PersistentVolumeClaim" not in [document["kind"] for document in documents(text)]
    [volume] = [each for each in pod_of(text)["volumes"] if each["name"] == "cache"]
    assert volume == {"name": "cache", "persistentVolumeClaim": {"claimName": "team-cache"}}


DIGEST = "@sha256:" + "0a" * 32


@pytest.mark.parametrize("reference", [f"r.io/x/job{DIGEST}", f"r.io:5000/job:1.0{DIGEST}"])
def test_images_named_by_digest_stay_as_they_are(reference: str) -> None:
    given = {"spec": ERNIE, "image": reference, "vllm_image": f"r.io/vllm{DIGEST}", "environ": {}}
    options = ManifestOptions(**given)  # type: ignore[arg-type]
    for kind in kubernetes.KINDS:
        text = kubernetes.render(options, "amd", kind=kind)
        images = re.findall(r"image: (r\.io\S+|docker\S+)", text)
        assert set(images) <= {reference, f"r.io/vllm{DIGEST}"}
        assert (f"r.io/vllm{DIGEST}" in images) == (kind == "vllm")
        assert (reference in images) == (kind != "quota")


def test_the_manifest_says_what_must_go_before_it_is_applied() -> None:
    done = job("manifest", LATEX, "--platform", "cpu")
    assert done.code == 0
    assert "kubectl delete job latex --cascade=foreground" in done.err
    assert documents(done.out)
    options = ManifestOptions(spec=LATEX, environ={})
    assert kubernetes.replacing(options, kind="vllm") is None  # a Deployment's pods can change
    named = [
        kubernetes.replacing(options, nodes, kind)
        for nodes, kind in ((2, "job"), (1, "trainjob"), (1, "vllm-smoke"), (1, "parity"))
    ]
    for command, what in zip(
        named,
        ("trainjob latex", "trainjob latex", "job latex-vllm-smoke", "job parity"),
        strict=True,
    ):
        assert f"delete {what} " in str(command)
    elsewhere = replace(options, cluster=kubernetes.Cluster(namespace="team"))
    assert "delete job latex --namespace team " in str(kubernetes.replacing(elsewhere))


@pytest.mark.parametrize("spec", [ERNIE, LATEX])
def test_every_manifest_of_every_platform_passes_the_lint(spec: str) -> None:
    sets = ("runtime.metrics_port=9464", "train.dataloader_num_workers=8")
    options = ManifestOptions(
        spec=spec, sets=sets, output="s3://b/x", registry="localhost:5000", environ={}
    )
    for platform in PLATFORMS:
        for kind in kubernetes.KINDS:
            text = kubernetes.render(options, platform, kind=kind)
            assert manifest_lint.problems(documents(text)) == [], (platform, kind)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["/root/cache", "cache"])
def test_a_cache_that_the_pod_cannot_write_is_refused(cache: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"{(ROOT / LATEX).read_text()}\nruntime: {{cache_dir: '${{HF_HOME}}'}}\n")
    with pytest.raises(UsageError, match="HF_HOME: is outside the pod's writable volumes"):
        kubernetes.render(ManifestOptions(spec=str(path), environ={"HF_HOME": cache}), "cpu")
    options = ManifestOptions(spec=str(path), environ={"HF_HOME": "/cache/hf"})
    text = kubernetes.render(options, "cpu")
    assert {"name": "HF_HOME", "value": "/cache/hf"} in container_of(text)["env"]
    assert manifest_lint.problems(documents(text)) == []


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"platform_name": "tpu"}, "--platform"),
        ({"platform_name": "amd", "kind": "pod"}, "--kind"),
        ({"platform_name": "amd", "nodes": 0}, "--nodes"),
        ({"platform_name": "cpu", "nodes": 2}, "--nodes"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=re.escape(field)):
        kubernetes.render(ManifestOptions(spec=LATEX, environ={}), **arguments)


@pytest.mark.parametrize("registry", ["https://x.com", "a b", "X.com/Team", "x.com/", "x.com:tag"])
def test_a_registry_that_no_image_comes_from_is_refused(registry: str) -> None:
    with pytest.raises(UsageError, match="--registry: must be a host"):
        kubernetes.render(ManifestOptions(spec=LATEX, registry=registry, environ={}), "cpu")


@pytest.mark.parametrize("registry", ["localhost:5000", "x.com/team/a_b", "10.0.0.1", "x.com:1/y"])
def test_images_come_from_the_registry_that_is_named(registry: str) -> None:
    text = kubernetes.render(ManifestOptions(spec=LATEX, registry=registry, environ={}), "cpu")
    assert container_of(text)["image"].startswith(f"{registry}/{constants.NAME}:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_size": "5Gi"}, "--cache-size: is less than the volume that the job needs, 10Gi"),
        ({"cache_size": "20GB"}, "--cache-size: must be a whole number of Gi or Ti"),
        ({"cache_size": "20Gi", "cache_claim": "x"}, "--cache-size: conflicts with --cache-claim"),
        ({"cache_claim": "My_Claim"}, "--cache-claim: must be the name"),
        ({"image": "r.io/job:latest"}, "--image: must name a digest, or a tag other than latest"),
        ({"image": "r.io/job"}, "--image: must name a digest"),
        ({"image": "r.io/job@sha256:12"}, "--image: must be an image with its registry"),
        ({"image": "job:1.0"}, "--image: must be an image with its registry"),
        ({"image": "r.io/job:1", "registry": "r.io"}, "--image: conflicts with --registry"),
        ({"vllm_image": "r.io/vllm:latest"}, "--vllm-image: must name a digest"),
    ],
)
def test_an_option_that_no_cluster_can_follow_is_refused(
    options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        kubernetes.render(ManifestOptions(spec=LATEX, environ={}, **options), "cpu")  # type: ignore[arg-type]


def test_a_folder_for_every_platform_takes_no_image_of_one() -> None:
    options = ManifestOptions(spec=LATEX, image=f"r.io/job{DIGEST}", environ={})
    with pytest.raises(UsageError, match="--image: conflicts with --directory"):
        kubernetes.folder(options)


@pytest.mark.parametrize(
    ("sets", "arguments", "message"),
    [
        (["name=4bit"], {}, "begin with a letter"),
        (["name=" + "a" * 52], {"nodes": 2}, "use at most 48 characters"),
        (["name=" + "a" * 52], {"kind": "trainjob"}, "use at most 48 characters"),
        (["export.merged.enabled=false"], {"kind": "vllm"}, "must be true for vLLM"),
        (["output.uri=/tmp/x"], {"kind": "vllm"}, "must be a bucket"),
    ],
)
def test_a_spec_that_makes_no_such_object_is_refused(
    sets: list[str], arguments: dict[str, Any], message: str
) -> None:
    options = ManifestOptions(spec=LATEX, sets=("output.uri=s3://b/x", *sets), environ={})
    with pytest.raises(SpecError, match=message):
        kubernetes.render(options, "amd", **arguments)


def test_the_longest_names_fit() -> None:
    for length, nodes, kinds in (
        (52, 1, {*kubernetes.KINDS} - {"trainjob"}),
        (48, 2, kubernetes.KINDS),
    ):
        sets = ("output.uri=s3://b/x", "name=" + "a" * length)
        options = ManifestOptions(
            spec=LATEX,
            sets=sets,
            cluster=kubernetes.Cluster(device_class="gpu.amd.com", storage_class="a" * 150),
            environ={},
        )
        for kind in kinds:
            text = kubernetes.render(options, "amd", nodes, kind)
            assert manifest_lint.problems(documents(text)) == []


def test_an_invalid_spec_is_refused_before_anything_is_rendered() -> None:
    with pytest.raises(SpecError, match="learning_rate"):
        kubernetes.render(
            ManifestOptions(spec=LATEX, sets=("train.learning_rate=-1",), environ={}), "amd"
        )


def test_a_checkpoint_needs_its_configuration_only(tmp_path: Path) -> None:
    config = (ROOT / "job/families/builtin/ernie-vl-tiny/config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    sets = [f"model.model_name_or_path={tmp_path}"]
    spec = load_spec((ROOT / LATEX).read_text(), "latex", sets, environ={}).spec
    builtin = load_spec((ROOT / LATEX).read_text(), "latex", environ={}).spec
    assert measure(spec).parameters == measure(builtin).parameters
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SpecError, match="'vit'"):
        measure(spec)


def test_a_secret_that_is_written_in_a_spec_or_an_option_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    typed = "s3://AbCdEf0123456789@bucket/rows.jsonl?apikey=typed-by-hand"
    path.write_text((ROOT / LATEX).read_text() + f"# {typed}\n")
    refused = (
        ManifestOptions(spec=str(path), environ={}),
        ManifestOptions(spec=LATEX, environ={}, sets=(f"runtime.cache_dir={typed}",)),
        ManifestOptions(spec=LATEX, environ={}, output=typed),
    )
    for options in refused:
        with pytest.raises(JobError, match="a secret, which the manifest would show") as raised:
            kubernetes.render(options, "cpu")
        assert "typed-by-hand" not in str(raised.value)
        assert "AbCdEf" not in str(raised.value)


def test_what_is_a_secret_by_its_looks_or_in_a_uri_is_left_to_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(
        (ROOT / LATEX)
        .read_text()
        .replace("uri: ${OUTPUT,outputs/latex}", "uri: ${OUTPUT}/${PREFIX}")
        .replace("instruction: Write the LaTeX", "system: ${ASKED}\n  instruction: Write the LaTeX")
    )
    environ = {
        "OUTPUT": "s3://bucket/run",
        "PREFIX": "Zq3vX9kLm2Np8RtYw5",
        "ASKED": "https://me:typed-by-hand@host/x",
    }
    text = kubernetes.render(ManifestOptions(spec=str(path), environ=environ), "cpu")
    assert {"name": "OUTPUT", "value": "s3://bucket/run"} in container_of(text)["env"]
    assert environ["PREFIX"] not in text
    assert "typed-by-hand" not in text

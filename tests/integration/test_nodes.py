"""Two nodes of two processes each, as a TrainJob starts them: one dies, all are started again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from job import kubernetes, storage
from job.kubernetes import constants
from job.kubernetes.options import ManifestOptions
from tests import nodes
from tests.conftest import S3
from tests.jobs import FORMULAS, ROOT, SMALL

NAMES = ("latex-node-0-0", "latex-node-0-1")
SETTINGS = {
    **SMALL,
    **FORMULAS,
    "eval.baseline": "false",
    "eval.max_samples": 2,
    "export.merged.enabled": "false",
    "train.max_steps": 14,
    "train.save_steps": 2,  # so that most of the training is left when one is lost
    "train.per_device_train_batch_size": 1,
    "train.gradient_accumulation_steps": 1,
}
SECONDS = 400


class TrainJob:
    """The pods of a manifest on two nodes; each start is one attempt of the whole set."""

    def __init__(self, network: nodes.Nodes, s3: S3, output: str, directory: Path) -> None:
        self._network, self._s3, self._directory = network, s3, directory
        sets = tuple(f"{key}={value}" for key, value in SETTINGS.items())
        options = ManifestOptions(
            spec=str(ROOT / "specs/latex.yaml"), sets=sets, output=output, environ={}
        )
        text = kubernetes.render(options, "cpu", nodes=len(NAMES))
        found = {document["kind"]: document for document in yaml.safe_load_all(text)}
        [job] = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
        [self._container] = job["template"]["spec"]["template"]["spec"]["containers"]
        directory.mkdir()
        (directory / constants.SPEC_FILE).write_text(found["ConfigMap"]["data"]["spec.yaml"])
        self._pods: list[subprocess.Popen[str]] = []
        self._attempt = 0

    def start(self) -> None:
        self._attempt += 1
        self._pods.clear()
        for rank, name in enumerate(NAMES):
            # The launcher reads the same PET_ variables as the job, which takes one process a pod.
            command = [sys.executable, "-m", "torch.distributed.run", "-m", "job"]
            command += self._arguments(name)
            with self._log(rank).open("w") as log:
                pod = self._network.start(name, command, self._environ(rank), log, ROOT)
            self._pods.append(pod)

    def _arguments(self, name: str) -> list[str]:
        """Those of the manifest, with folders here in the places of the pod's volumes."""
        volumes = {
            constants.SPEC_DIR: str(self._directory),
            f"cache_dir={constants.CACHE}": f"cache_dir={self._directory}/cache",  # shared by all
            f"workdir={constants.WORK}": f"workdir={self._directory}/{name}",
        }
        given: list[str] = list(self._container["args"])
        for there, here in volumes.items():
            assert any(there in each for each in given)
            given = [each.replace(there, here) for each in given]
        return given

    def _environ(self, rank: int) -> dict[str, str]:
        """What the manifest, the Secret and the Trainer's plugin for torch set."""
        return {
            **os.environ,
            **{each["name"]: each["value"] for each in self._container["env"]},
            **self._s3.environ,
            "AWS_ENDPOINT_URL": self._network.endpoint,
            "PET_NNODES": str(len(NAMES)),
            "PET_NPROC_PER_NODE": "2",
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": f"{NAMES[0]}.job",
            "PET_MASTER_PORT": "29400",
            "OMP_NUM_THREADS": "1",
        }

    def _log(self, rank: int) -> Path:
        return self._directory / f"said-{self._attempt}-{rank}.txt"

    def said(self) -> str:
        return "\n".join(self._log(rank).read_text() for rank in range(len(NAMES)))

    def events(self, name: str) -> list[dict[str, object]]:
        lines = [line for line in self.said().splitlines() if line.startswith("{")]
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.events(name):
            assert time.monotonic() < deadline, self.said()
            assert all(pod.poll() is None for pod in self._pods), self.said()
            time.sleep(0.05)

    def lose(self, rank: int) -> None:
        """Kills every process of a node, without a word to the others."""
        self._pods[rank].kill()

    def codes(self) -> list[int]:
        """The exit codes of the nodes, once all have ended."""
        return [pod.wait(SECONDS) for pod in self._pods]

    def kill(self) -> None:
        for pod in self._pods:
            pod.kill()
            pod.wait()


def weights(output: str) -> dict[str, bytes]:
    """What was trained, by its path at the output."""
    return {
        entry.path: storage.read_bytes(storage.join(output, entry.path))
        for entry in storage.list_files(output)
        if entry.path.endswith(".safetensors") and not entry.path.startswith("checkpoints/")
    }


@pytest.mark.slow(minutes=2)
@pytest.mark.timeout(1500)
def test_a_node_that_dies_in_training_changes_no_byte_once_the_set_is_started_again(
    s3: S3, tmp_path: Path
) -> None:
    if reason := nodes.missing():
        pytest.skip(reason)
    hosts = tmp_path / "network"
    hosts.mkdir()
    with nodes.Nodes(NAMES, s3.server.port, hosts) as network:
        undisturbed = TrainJob(network, s3, s3.uri("undisturbed"), tmp_path / "undisturbed")
        disturbed = TrainJob(network, s3, s3.uri("disturbed"), tmp_path / "disturbed")
        try:
            undisturbed.start()
            assert undisturbed.codes() == [0, 0], undisturbed.said()
            assert undisturbed.events("processes joined")[0]["processes"] == 4

            disturbed.start()
            disturbed.wait_for("checkpoint stored")
            disturbed.lose(1)
            first, second = disturbed.codes()
            assert first != 0, disturbed.said()
            assert second == -9
            # The launcher asks rank 0 to stop too, which must not hide why the job ended.
            [error] = disturbed.events("a process of the job was lost")
            assert error["field"] == "rank 2, rank 3"
            assert error["exit_code"] == 70

            disturbed.start()  # as the JobSet does when a pod of it has failed
            assert disturbed.codes() == [0, 0], disturbed.said()
            assert disturbed.events("resuming"), disturbed.said()
        finally:
            undisturbed.kill()
            disturbed.kill()
        expected, found = weights(s3.uri("undisturbed")), weights(s3.uri("disturbed"))
        assert "adapter/adapter_model.safetensors" in expected
        assert found == expected

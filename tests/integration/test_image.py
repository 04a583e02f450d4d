"""The cpu image, built from a base made here, runs the whole job as the manifest tells it to.

Needs root, buildah and mmdebstrap (Debian: apt-get install buildah mmdebstrap), and about 48 GB of
disk for the time of the test.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from job import __version__
from job.kubernetes import constants
from tests.jobs import ROOT, make, read_json, sums

BASE, DISK = "localhost/debian:12", 48 * 2**30
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Buildah:
    """buildah with storage of its own, in chroots: it needs no daemon and no namespaces."""

    storage: Path

    @property
    def command(self) -> list[str]:
        root, run = self.storage / "root", self.storage / "run"
        # The cache mounts of its builds are in the temporary folder.
        return [
            "env",
            f"TMPDIR={self.storage.parent}",
            "buildah",
            f"--root={root}",
            f"--runroot={run}",
        ]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"buildah {' '.join(arguments)}: {done.stderr[-4000:]}"
        return done.stdout.strip()


def _missing() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    for program in ("apt-get", "buildah", "mmdebstrap"):
        if shutil.which(program) is None:
            return f"needs {program}"
    return None


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if reason := _missing():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("images")
    if shutil.disk_usage(directory).free < DISK:
        pytest.skip(f"needs {DISK // 2**30} GiB of disk")
    tool = Buildah(directory / "storage")
    try:
        yield tool
    finally:
        subprocess.run([*tool.command, "umount", "--all"], capture_output=True)
        subprocess.run([*tool.command, "rm", "--all"], capture_output=True)
        subprocess.run([*tool.command, "rmi", "--all", "--force"], capture_output=True)
        # It leaves a mount of its storage on itself, which could not be removed.
        for mount in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if mount.split()[1].startswith(f"{directory}/"):
                subprocess.run(["umount", "--lazy", mount.split()[1]], capture_output=True)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def image(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the image, as `make image` builds it."""
    directory = tmp_path_factory.mktemp("base")
    archive = directory / "base.tar"
    made = ["mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "bookworm", str(archive)]
    # In a folder that apt's own user can enter.
    environ = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    done = subprocess.run(made, env=environ, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no base can be made here: {done.stderr[-300:]}")
    container = buildah("from", "scratch")
    buildah("add", "-q", container, str(archive), "/")
    buildah("commit", "-q", "--rm", container, BASE)
    archive.unlink()

    # The index with torch's CPU build is out of reach here, and certificates are the host's.
    flags = ["--isolation=chroot", "--pull=never", "--build-arg=ACCELERATOR=default"]
    if CERTIFICATES.exists():
        settings = directory / "pip.conf"
        settings.write_text("[global]\ncert = /etc/ssl/host.crt\ntimeout = 180\n")
        flags += [f"--volume={CERTIFICATES}:/etc/ssl/host.crt:ro"]
        flags += [f"--volume={settings}:/etc/pip.conf:ro"]
    arguments = {
        "ACCELERATOR": "cpu",
        "ENGINE": " ".join(buildah.command),
        "BASE_IMAGE": BASE,
        "IMAGE_FLAGS": " ".join(flags),
    }
    built = make("image", *(f"{name}={value}" for name, value in arguments.items()))
    assert built.code == 0, built.out[-4000:] + built.err[-4000:]
    assert re.search(r"/finetune-job:\S+-cpu: [\d.]+ GB unpacked\n$", built.out), built.out[-400:]
    found = json.loads(buildah("images", "--json"))
    [name] = [name for entry in found for name in entry["names"] or () if "finetune-job" in name]
    return str(name)


@pytest.fixture(scope="module")
def config(buildah: Buildah, image: str) -> Any:
    return json.loads(buildah("inspect", "--type=image", image))["OCIv1"]["config"]


def test_the_image_says_what_it_is(config: Any, image: str) -> None:
    assert config["User"] == f"{constants.UID}:{constants.UID}"
    assert config["Entrypoint"] == ["/opt/venv/bin/python", "-m", "job"]
    assert config["Volumes"] == {constants.CACHE: {}}
    labels = {name.rpartition("image.")[2]: text for name, text in config["Labels"].items()}
    assert image.endswith(f":{labels['version']}-cpu")
    assert labels["base.name"] == BASE
    assert labels["revision"] not in ("", "unknown")


@pytest.fixture
def container(buildah: Buildah, image: str) -> Iterator[str]:
    name = buildah("from", "--pull=never", image)
    yield name
    buildah("rm", name)


def test_the_whole_job_runs_in_it_as_the_manifest_says(
    buildah: Buildah, container: str, config: Any, tmp_path: Path
) -> None:
    manifest = ROOT / "k8s" / "overlays" / "cpu-smoke" / "finetune-job.yaml"
    documents = {found["kind"]: found for found in yaml.safe_load_all(manifest.read_text())}
    pod = documents["Job"]["spec"]["template"]["spec"]
    [doctor], [asked] = pod["initContainers"], pod["containers"]
    settings = tmp_path / "spec"
    settings.mkdir()
    spec = documents["ConfigMap"]["data"][constants.SPEC_FILE]
    (settings / constants.SPEC_FILE).write_text(spec)
    mounts = []
    for mount in asked["volumeMounts"]:
        path = settings if mount["name"] == "spec" else tmp_path / mount["name"]
        path.mkdir(exist_ok=True)
        if not mount.get("readOnly"):
            os.chown(path, constants.UID, constants.UID)
        mounts.append(f"--volume={path}:{mount['mountPath']}{':ro' * mount.get('readOnly', False)}")
    run = ("run", "--isolation=chroot", *mounts, container, "--")

    assert buildah(*run, "id", "-u") == str(constants.UID)
    assert buildah(*run, "finetune-job", "--version") == __version__
    buildah(*run, *config["Entrypoint"], *doctor["args"])
    few = ("--set", "train.max_steps=20", "--set", "data.train.limit=640")  # minutes less
    buildah(*run, *config["Entrypoint"], *asked["args"], *few)

    output = tmp_path / "cache" / "outputs" / documents["Job"]["metadata"]["name"]
    record = read_json(output / "run.json")
    assert record["status"] == "succeeded"
    assert record["versions"]["source_revision"]
    assert sums(output)
    # With a root file system that cannot be written it would have done the same.
    root = Path(buildah("mount", container))
    written = [
        str(path)
        for folder, _, names in os.walk(root)
        for path in (Path(folder) / name for name in names)
        if path.lstat().st_uid == constants.UID
    ]
    assert written == []


def test_with_the_system_packages_of_the_images_for_gpus_it_compiles(
    buildah: Buildah, container: str, config: Any
) -> None:
    """The default wheels are CUDA's, and Triton's have the sources for both kinds of GPU."""
    run = ("run", "--isolation=chroot", "--user=0:0", container, "--")
    system = ("env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
    # The script makes the user, who is there already.
    script = f"userdel job && ACCELERATOR=cuda JOB_UID={constants.UID} containers/runtime.sh"
    buildah(*run, *system, "sh", "-c", script)
    for accelerator in ("cuda", "rocm"):
        check = ("containers/check.py", "image", accelerator)
        checked = buildah(*run, config["Entrypoint"][0], *check)
        assert checked.endswith("the image is as it should be")


def test_an_error_in_it_has_its_exit_code(buildah: Buildah, container: str, config: Any) -> None:
    run = ["run", "--isolation=chroot", container, "--", *config["Entrypoint"]]
    bad = ["validate", "specs/latex.yaml", "--set=lora.r=0"]
    done = subprocess.run([*buildah.command, *run, *bad], capture_output=True, text=True)
    assert done.returncode == 10, done.stderr
    assert "$.lora.r" in done.stderr

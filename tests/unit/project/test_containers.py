"""The Containerfiles lint, agree with the manifests, and the check that builds run finds faults."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from job import __version__
from job.kubernetes import constants
from job.kubernetes.platforms import PLATFORMS
from tests.jobs import ROOT, make, tool

CONTAINERS = ROOT / "containers"
FILES = sorted(CONTAINERS.glob("*.Containerfile"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
BASE = re.compile(r"ARG BASE_IMAGE=[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_every_accelerator_has_an_image() -> None:
    accelerators = {platform.accelerator for platform in PLATFORMS.values()}
    assert {path.stem for path in FILES} == accelerators


@each_file
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_hadolint_is_awake(tmp_path: Path) -> None:
    bad = tmp_path / "bad.Containerfile"
    bad.write_text("FROM debian:latest\nENTRYPOINT python -m job\n")
    done = subprocess.run([tool("hadolint"), str(bad)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "DL3007" in done.stdout
    assert "DL3025" in done.stdout


@each_file
def test_the_base_is_named_by_tag_and_digest_as_a_build_argument(path: Path) -> None:
    [base] = [line for line in lines(path) if line.startswith("ARG BASE_IMAGE=")]
    assert BASE.fullmatch(base)
    stages = [line for line in lines(path) if line.startswith("FROM ")]
    assert stages == ["FROM ${BASE_IMAGE} AS build", "FROM ${BASE_IMAGE}"]


@pytest.mark.parametrize(
    "base",
    [
        "debian:12-slim",
        "debian@sha256:" + "0" * 64,
        "debian:12-slim@sha256:" + "0" * 63,
        "debian:12-slim@sha256:" + "g" * 64,
    ],
)
def test_a_base_without_tag_or_whole_digest_is_none(base: str) -> None:
    assert not BASE.fullmatch(f"ARG BASE_IMAGE={base}")


def test_all_images_have_one_base() -> None:
    assert len({line for path in FILES for line in lines(path) if "BASE_IMAGE=" in line}) == 1


@each_file
def test_make_names_the_image_that_the_manifests_ask_for(path: Path) -> None:
    done = make("-n", "image", f"ACCELERATOR={path.stem}", "ENGINE=podman", "REGISTRY=r.io")
    assert f"-t {constants.image('r.io', path.stem)} " in done.out
    assert any(line.endswith(" .") for line in done.out.splitlines())
    # Said after the build, which nothing else tells.
    assert (
        f"podman image inspect --format '{{{{.Size}}}}' {constants.image('r.io', path.stem)}"
        in done.out
    )


def test_make_passes_the_packages_that_are_asked_for_beside_the_base() -> None:
    arguments = ("-n", "image", "ACCELERATOR=rocm", "ENGINE=podman", "EXTRAS=gpu trackers")
    assert '--build-arg EXTRAS="gpu trackers" .' in make(*arguments).out


def test_an_image_is_not_made_from_the_index_of_the_environment_here(tmp_path: Path) -> None:
    (tmp_path / ".torch").write_text("cpu\nhttps://index.example/cpu\n")
    arguments = ("-n", "image", "ACCELERATOR=rocm", "ENGINE=podman", f"VENV={tmp_path}")
    assert "TORCH_INDEX" not in make(*arguments).out
    asked = make(*arguments, "TORCH_INDEX=https://index.example/rocm").out
    assert "--build-arg TORCH_INDEX=https://index.example/rocm " in asked


def test_an_image_is_made_from_the_mirrors_that_are_named() -> None:
    arguments = ("-n", "image", "ACCELERATOR=rocm", "ENGINE=podman")
    mirrors = ("PIP_INDEX_URL=https://mirror.example/simple", "APT_MIRROR=http://mirror.example")
    told = make(*arguments, *mirrors).out
    assert all(f"--build-arg {mirror}" in told for mirror in mirrors)
    for path in FILES:
        build, run = path.read_text().split("FROM ${BASE_IMAGE}")[1:]
        assert {"ARG PIP_INDEX_URL", "ARG APT_MIRROR"} <= set(build.splitlines())
        assert "ARG APT_MIRROR" in run.splitlines()
        assert "PIP_INDEX_URL" not in run


def test_an_image_is_made_without_the_index_and_the_passwords_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("image", "ACCELERATOR=rocm", "ENGINE=true")
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:hunter2@mirror.example/simple")
    done = make("-n", *arguments)
    assert done.code == 0
    assert "mirror.example" not in done.out + done.err
    for name in ("PIP_INDEX_URL", "TORCH_INDEX", "APT_MIRROR"):
        done = make(*arguments, f"{name}=https://user:hunter2@mirror.example/simple")
        assert done.code == 2
        assert "holds a user or a password" in done.err
        assert "hunter2" not in done.out + done.err


@pytest.mark.parametrize("script", ["build.sh", "runtime.sh"])
def test_apt_asks_the_mirror_for_the_same_paths(script: str, tmp_path: Path) -> None:
    text = (CONTAINERS / script).read_text(encoding="utf-8")
    swap = re.findall(r"^if \[ -n .*?^fi$", text, re.MULTILINE | re.DOTALL)[0]
    sources = tmp_path / "sources.list.d" / "debian.sources"
    sources.parent.mkdir()
    sources.write_text("URIs: http://base.example/debian\nSigned-By: /usr/share/k.gpg\n")
    (tmp_path / "sources.list").write_text("deb [arch=amd64] https://a.example/ubuntu noble main\n")
    for mirror in ("", "http://mirror.example/"):
        command = ["sh", "-eu", "-c", swap.replace("/etc/apt", str(tmp_path))]
        environ = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "APT_MIRROR": mirror}
        subprocess.run(command, check=True, env=environ)
    assert sources.read_text() == (
        "URIs: http://mirror.example/debian\nSigned-By: /usr/share/k.gpg\n"
    )
    assert (tmp_path / "sources.list").read_text() == (
        "deb [arch=amd64] http://mirror.example/ubuntu noble main\n"
    )


@pytest.mark.parametrize("mirror", ["", "http://mirror.example"])
def test_the_image_keeps_the_package_sources_of_its_base(mirror: str, tmp_path: Path) -> None:
    apt, commands, asked = tmp_path / "apt", tmp_path / "bin", tmp_path / "asked"
    (apt / "sources.list.d").mkdir(parents=True)
    sources = apt / "sources.list.d" / "debian.sources"
    sources.write_text("URIs: http://base.example/debian\n")
    commands.mkdir()
    for name in ("apt-get", "groupadd", "useradd", "install"):
        (commands / name).write_text(f"#!/bin/sh\ncat {sources} > {asked}\n")
        (commands / name).chmod(0o755)
        if name == "apt-get":  # the others come after it
            asked = tmp_path / "later"
    script = (CONTAINERS / "runtime.sh").read_text(encoding="utf-8")
    script = script.replace("/etc/apt", str(apt)).replace("/var/lib/apt", str(tmp_path / "lists"))
    environ = {"PATH": f"{commands}:{os.environ['PATH']}", "APT_MIRROR": mirror}
    environ |= {"ACCELERATOR": "cpu", "JOB_UID": "10001", "TMPDIR": str(tmp_path)}
    subprocess.run(["sh", "-c", script], check=True, env=environ)
    wanted = f"URIs: {mirror or 'http://base.example'}/debian\n"
    assert (tmp_path / "asked").read_text() == wanted
    assert (tmp_path / "later").read_text() == sources.read_text()
    assert sources.read_text() == "URIs: http://base.example/debian\n"
    assert not list(tmp_path.glob("tmp.*"))


def test_make_refuses_an_accelerator_without_an_image() -> None:
    done = make("image", "ACCELERATOR=tpu", "ENGINE=podman")
    assert done.code == 2
    assert "must be rocm, cuda or cpu (found tpu)" in done.err


def test_the_documents_name_the_images_of_this_version() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    assert set(re.findall(r"finetune-job:([\d.]+)-", pages)) == {__version__}


@each_file
def test_the_image_is_what_the_manifests_take_it_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"USER {constants.UID}:{constants.UID}\n" in text
    assert f"ACCELERATOR={path.stem} JOB_UID={constants.UID} containers/runtime.sh" in text
    assert f"ACCELERATOR={path.stem} containers/finish.sh" in text
    assert f'VOLUME ["{constants.CACHE}"]' in text
    assert f"HOME={constants.CACHE} " in text
    # A user that OpenShift chooses has no name of its own.
    assert "USER=job " in text
    assert "LOGNAME=job " in text
    assert 'ENTRYPOINT ["/opt/venv/bin/python", "-m", "job"]' in text


@each_file
def test_every_cache_is_on_the_volume(path: Path) -> None:
    names = re.findall(
        r"^\s*(?:ENV )?(\w*(?:HOME|CACHE|DIR|DB_PATH)\w*)=(\S+)", path.read_text(), re.M
    )
    assert len(names) >= 6
    for name, place in names:
        assert place.startswith(constants.CACHE), name


@each_file
def test_the_labels_are_those_of_oci(path: Path) -> None:
    found = set(re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", path.read_text()))
    assert found == {"title", "description", "licenses", "version", "revision", "base.name"}


def test_nothing_is_sent_to_an_engine_but_what_an_image_needs() -> None:
    ignored = lines(ROOT / ".dockerignore")
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source
        for path in FILES
        for line in lines(path)
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert "*" in ignored
    named = {source.partition("/")[0] for source in copied}
    assert {source.partition("/")[0] for source in sent} == named


@each_file
def test_a_change_of_a_script_or_of_the_job_installs_no_package_anew(path: Path) -> None:
    """A layer is built again once anything that was copied before it has changed."""
    steps = re.sub(r"\\\n\s*", " ", path.read_text()).splitlines()
    [install] = [
        index
        for index, step in enumerate(steps)
        if "containers/build.sh" in step[4:] and step.startswith("RUN")
    ]
    copied = {
        source
        for step in steps[:install]
        if step.startswith("COPY ")
        for source in step.split()[1:-1]
    }
    assert copied == {
        "containers/build.sh",
        "requirements/install.sh",
        *(f"requirements/{lock}.txt" for lock in ("base", "gpu", "torch", "trackers", "unsloth")),
    }
    assert "--mount=type=cache,target=/root/.cache/pip" in steps[install]
    [runtime] = [
        index
        for index, step in enumerate(steps)
        if "containers/runtime.sh" in step and step.startswith("RUN")
    ]
    before = [step for step in steps[steps.index("FROM ${BASE_IMAGE}") : runtime] if "COPY" in step]
    assert before == ["COPY containers/runtime.sh containers/"]
    # Arguments that differ at every build come after the last command.
    last = max(index for index, step in enumerate(steps) if step.startswith("RUN "))
    assert steps.index("ARG REVISION=unknown") > last


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@each_file
def test_the_packages_of_the_image_resolve_for_its_platform(
    path: Path, python: str, tmp_path: Path
) -> None:
    """As wheels, so that no compiler is needed; torch itself where the package index has it."""
    [extras] = re.findall(r"^ARG EXTRAS=(.*)$", path.read_text(), re.MULTILINE)
    locks = ["base", *extras.split(), *(["torch"] if path.stem == "cuda" else [])]
    command = [tool("uv"), "pip", "install", "--dry-run", "--no-deps", "--only-binary=:all:"]
    command += [f"--target={tmp_path}", "--python-platform=x86_64-manylinux_2_28"]
    command += [f"--python-version={python}", "--system-certs"]
    command += [f"--requirements={ROOT / 'requirements' / lock}.txt" for lock in locks]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resolved = set(re.findall(r"^ \+ (\S+)==", done.stderr, re.MULTILINE))
    assert "transformers" in resolved
    assert ("bitsandbytes" in resolved) == (path.stem != "cpu")
    assert ("torch" in resolved) == (path.stem == "cuda")
    assert path.stem == "cuda" or not any(name.startswith("nvidia-") for name in resolved)


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONTAINERS / "check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_check_tells_a_wrong_build_of_torch() -> None:
    done = check("packages", "rocm")
    assert done.returncode == 1
    assert "is no rocm build" in done.stdout
    assert "triton belongs to a CUDA build of torch" in done.stdout


def test_the_check_finds_what_is_left() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("this machine has no compiler to find")
    done = check("image", "cpu")
    assert done.returncode == 1
    assert "gcc is left" in done.stdout
    assert "pip is left in the environment" in done.stdout


@pytest.fixture
def triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty, so that no earlier result is taken for a compiler."""
    monkeypatch.syspath_prepend(str(CONTAINERS))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    importlib.import_module("triton.runtime.build")._find_compiler.cache_clear()
    return tmp_path


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="this machine has no compiler")


@needs_gcc
@pytest.mark.parametrize("backend", ["nvidia", "amd"])
def test_the_check_compiles_what_triton_compiles(backend: str, triton_cache: Path) -> None:
    import check as checks

    assert list(checks._triton(backend)) == []
    assert list((triton_cache / "triton").rglob("*.so"))


@needs_gcc
def test_an_image_for_gpus_that_cannot_compile_is_refused(
    triton_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import check as checks

    # What gcc does where libpython3-dev is missing: Triton names that folder and no other does.
    compiler = triton_cache / "gcc"
    without = (
        """for a; do shift; case $a in -I*include/python3*) ;; *) set -- "$@" "$a";; esac; done"""
    )
    compiler.write_text(f'#!/bin/sh\n{without}\nexec {shutil.which("gcc")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    [problem] = checks._triton("nvidia")
    assert "Triton cannot start kernels here" in problem
    assert "Python.h: No such file" in capfd.readouterr().err

    importlib.import_module("triton.runtime.build")._find_compiler.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(triton_cache / "empty"))
    [problem] = checks._triton("nvidia")
    assert "Failed to find C compiler" in problem


@pytest.mark.parametrize(
    ("version", "belongs"),
    [("3.8.0", True), ("3.8.0+git1", True), ("3.8.0+rocm7.2.1.git3", False)],
)
def test_a_triton_that_was_built_for_rocm_is_accepted(
    version: str, belongs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMD's own index calls it triton, as the CUDA one is called."""
    from importlib.metadata import distributions

    monkeypatch.syspath_prepend(str(CONTAINERS))
    import check as checks

    info = tmp_path / f"triton-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: triton\nVersion: {version}\n")
    [package] = distributions(name="triton", path=[str(tmp_path)])
    problems = list(checks._build("rocm", {"triton": package}))
    assert ("triton belongs to a CUDA build of torch" in problems) == belongs


def test_a_library_of_bitsandbytes_is_loaded_and_not_only_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file was there for ROCm, and hipBLAS was not."""
    from importlib.metadata import distributions

    monkeypatch.syspath_prepend(str(CONTAINERS))
    import check as checks

    (tmp_path / "bitsandbytes").mkdir()
    library = tmp_path / "bitsandbytes" / "libbitsandbytes_rocm72.so"
    (tmp_path / "bitsandbytes-1.0.dist-info").mkdir()
    metadata = tmp_path / "bitsandbytes-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 1.0\n")
    [package] = distributions(name="bitsandbytes", path=[str(tmp_path)])
    builds = {"cuda": None, "rocm": "7.2.53211"}

    def problem() -> str:
        [found] = checks._bitsandbytes(package, builds)
        return str(found)

    assert "it has no libbitsandbytes_rocm72.so" in problem()
    library.write_bytes(b"no library")
    assert "libbitsandbytes_rocm72.so: " in problem()
    assert "file too short" in problem() or "invalid ELF header" in problem()
    library.unlink()
    another = importlib.import_module("numpy._core._multiarray_umath").__file__
    library.symlink_to(str(another))
    assert "lacks cadam_8bit_blockwise_grad_bf16" in problem()


@pytest.fixture
def small_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called torch, with a record of its one file."""
    import base64
    import hashlib

    source = b"x = 1\n"
    digest = base64.urlsafe_b64encode(hashlib.sha256(source).digest()).rstrip(b"=").decode()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "file.py").write_bytes(source)
    info = tmp_path / "torch-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0\n")
    (info / "RECORD").write_text(f"torch/file.py,sha256={digest},6\n")
    monkeypatch.syspath_prepend(str(CONTAINERS))
    return tmp_path


def test_the_check_finds_a_torch_that_was_replaced(small_torch: Path) -> None:
    from importlib.metadata import distributions

    import check as checks

    [package] = distributions(name="torch", path=[str(small_torch)])
    assert list(checks._changed(package)) == []
    (small_torch / "torch" / "file.py").write_text("x = 2\n")
    assert list(checks._changed(package)) == ["torch was replaced: torch/file.py is another file"]
    (small_torch / "torch" / "file.py").unlink()
    assert list(checks._changed(package)) == ["torch has lost torch/file.py"]
    assert list(checks._installed("torch", "2.1", {"torch": package})) == [
        "torch is 2.0; the lock says 2.1"
    ]

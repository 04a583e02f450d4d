"""What the doctor finds on machines, in environments and at services that are well or ill."""

import dataclasses
import json
import os
import platform
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from job import log
from job.distributed.cores import cores
from job.doctor import access, capacity, device, exit_code, software, text
from job.doctor.check import Check, State, fail, failed, ok, warn
from job.doctor.subject import Subject
from job.engines import cpu
from job.engines.device import detect
from job.errors import InputError, OutOfMemoryError, StorageError
from job.planning.requirements import GIB, Needs
from job.planning.sizes import Sizes
from job.spec.load import load_spec
from tests.jobs import ROOT
from tests.servers import Answer, serving

SIZES = Sizes(
    parameters=10**9,
    trainable=10**6,
    download=2 * GIB,
    adapter=GIB,
    checkpoint=GIB,
    merged=2 * GIB,
)
NEEDS = Needs(
    memory=8 * GIB,
    shared_memory=2 * GIB,
    cache=4 * GIB,
    work=6 * GIB,
    tmp=GIB,
    weights=3 * GIB,
    server_memory=8 * GIB,
    save_seconds=200,
    grace_seconds=360,
)


def one(checks: Iterator[Check]) -> Check:
    [found] = checks
    return found


# --- the verdict ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ([ok("a", "x"), warn("b", "x", "y")], 0),
        ([fail("a", "x", "y")], 70),
        ([failed("a", StorageError("s3://b", "timed out"))], 70),
        ([failed("a", InputError("s3://b", "access denied"))], 12),
        ([fail("a", "x", "y"), failed("b", InputError("s3://b", "is missing"))], 12),
        ([failed("a", OutOfMemoryError("memory", "is full"))], 12),
    ],
)
def test_the_exit_code_says_whether_another_try_can_help(
    checks: Sequence[Check], code: int
) -> None:
    assert exit_code(checks) == code


def test_a_screen_shows_state_finding_and_fix_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_SECRET", "planted-value-123")
    log.configure("text")
    shown = text(fail("disk", "planted-value-123: full", "free space"))
    assert shown == "FAIL  disk            ${MY_SECRET}: full\n      fix: free space"


# --- packages -------------------------------------------------------------------------------


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    (tmp_path / "base.txt").write_text("# made\nnumpy==2.0\nPy_Yaml==6.0 ; x\n")
    (tmp_path / "torch.txt").write_text("torch==2.14.1\ntorchvision==0.29.1\nnvidia-nccl==2.1\n")
    (tmp_path / "gpu.txt").write_text("bitsandbytes==0.50\n")
    return tmp_path


PLAIN = {
    "numpy": "2.0",
    "py-yaml": "6.0",
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "nvidia-nccl": "2.1",
}
ROCM = {
    "numpy": "2.0",
    "py-yaml": "6.0",
    "torch": "2.14.1+rocm7.2",
    "torchvision": "0.29.1+rocm7.2",
    "bitsandbytes": "0.50",
}


@pytest.mark.parametrize(
    ("found", "state", "text"),
    [
        (PLAIN, "ok", "5 as locked"),
        (ROCM, "ok", "5 as locked"),
        ({**PLAIN, "numpy": "2.1"}, "warn", "numpy 2.1 (locked: 2.0)"),
        ({**ROCM, "bitsandbytes": "0.49"}, "warn", "bitsandbytes 0.49"),
        ({**PLAIN, "torch": "2.15.0"}, "warn", "torch 2.15.0 (locked: 2.14.1)"),
        ({"torch": "2.14.1"}, "fail", "missing: numpy, py-yaml"),
    ],
)
def test_packages_are_held_against_the_lock(
    locks: Path, found: dict[str, str], state: State, text: str
) -> None:
    check = software.packages(locks, found)
    assert check.state == state
    assert text in check.found


def test_without_a_lock_nothing_is_judged(tmp_path: Path) -> None:
    assert software.packages(tmp_path, PLAIN).state == "note"


def test_the_packages_of_this_environment_are_locked() -> None:
    check = software.packages(software.LOCKS, software.installed())
    assert check.state == "ok", check.found


def test_of_two_copies_the_one_that_is_imported_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = software.installed()
    second = tmp_path / "torch-0.1.dist-info"
    second.mkdir()
    (second / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert software.installed() == found


def test_what_a_spec_asks_for_beside_the_base_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JOB_VLLM_PYTHON", "/no/such/python")
    text = (ROOT / "specs/latex.yaml").read_text()
    spec = load_spec(text, "latex.yaml", ["export.verify=vllm"], {}).spec
    found = {check.name: check for check in software.checks(spec)}
    assert found["vllm"].state == "fail"
    assert found["vllm"].exit_code == InputError.exit_code
    assert "JOB_VLLM_PYTHON" in found["vllm"].fix


# --- the device -----------------------------------------------------------------------------


def amd(root: Path) -> None:
    (root / "dev/dri").mkdir(parents=True)
    (root / "dev/kfd").touch()
    (root / "dev/dri/renderD128").touch()
    (root / "sys/module/amdgpu").mkdir(parents=True)
    (root / "sys/module/amdgpu/version").write_text("6.16.6\n")


def nvidia(root: Path) -> None:
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 06:33:38 UTC 2026\n"
    )


@pytest.mark.parametrize(
    ("make", "accelerator", "version"), [(amd, "rocm", "6.16.6"), (nvidia, "cuda", "580.65.06")]
)
def test_a_driver_is_told_by_the_files_of_the_system(
    tmp_path: Path, make: Callable[[Path], None], accelerator: str, version: str
) -> None:
    make(tmp_path)
    [driver] = device.drivers(tmp_path)
    assert (driver.accelerator, driver.version, driver.inaccessible) == (accelerator, version, ())


def test_a_machine_without_a_driver_has_none(tmp_path: Path) -> None:
    assert device.drivers(tmp_path) == []
    check = one(device.driver_checks([], "cuda", "auto"))
    assert check.state == "note"


@pytest.mark.parametrize(
    ("driver", "built", "accelerator", "states"),
    [
        ("rocm", "rocm", "auto", ["ok"]),
        ("cuda", "cuda", "cuda", ["ok"]),
        ("rocm", "cuda", "auto", ["ok", "fail"]),
        ("cuda", "cpu", "cuda", ["ok", "fail"]),
        ("rocm", "cuda", "cpu", ["ok"]),
    ],
)
def test_the_build_of_torch_must_be_one_for_the_driver(
    driver: str, built: str, accelerator: str, states: list[State]
) -> None:
    there = [device.Driver(accelerator=driver, version="1")]
    found = list(device.driver_checks(there, built, accelerator))
    assert [check.state for check in found] == states
    if states[-1] == "fail":
        assert f"make setup ACCELERATOR={driver}" in found[-1].fix


def test_a_device_that_may_not_be_opened_is_named_with_the_groups_to_add() -> None:
    there = [device.Driver(accelerator="rocm", version="1", inaccessible=("/dev/kfd",))]
    check = one(device.driver_checks(there, "rocm", "rocm"))
    assert check.state == "fail"
    assert "/dev/kfd cannot be opened" in check.found
    assert "supplementalGroups" in check.fix


@pytest.mark.parametrize(
    ("architecture", "built", "runs"),
    [
        ("gfx942", ["gfx90a", "gfx942"], True),
        ("gfx1100", ["gfx90a", "gfx942"], False),
        ("sm_90", ["sm_80", "sm_90"], True),
        ("sm_86", ["sm_80", "sm_90"], True),
        ("sm_75", ["sm_80", "sm_90"], False),
        ("sm_120", ["sm_80", "sm_90", "compute_90"], True),
        ("sm_120", ["sm_80", "sm_90", "sm_100"], False),
        ("sm_90", ["compute_120"], False),
    ],
)
def test_a_build_covers_the_architectures_that_it_has_code_for(
    architecture: str, built: list[str], runs: bool
) -> None:
    assert device.is_supported(architecture, built) is runs


def test_a_gpu_that_is_asked_for_and_not_seen_is_a_failure() -> None:
    check = device.no_gpu("rocm", [], "rocm")
    assert check.state == "fail"
    assert "runtime.accelerator is rocm" in check.found


# --- places ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "limited"), [("1073741824\n", True), ("max\n", False)])
def test_the_limit_of_the_container_counts(tmp_path: Path, text: str, limited: bool) -> None:
    (tmp_path / "memory.max").write_text(text)
    found = cpu.memory_limit(tmp_path)
    assert (found == GIB) is limited
    assert (found < cpu.memory_limit(tmp_path / "none")) is limited


def test_a_cpu_has_the_memory_and_the_cores_of_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan is made for and what training names is what doctor looks at."""
    monkeypatch.setattr(cpu, "memory_limit", lambda: 3 * GIB)
    monkeypatch.setattr("job.engines.device.cores", lambda: 5)
    spec = load_spec((ROOT / "specs/latex.yaml").read_text(), "latex", environ={}).spec
    found = detect(dataclasses.replace(spec.runtime, accelerator="cpu"))
    assert (found.memory_bytes, found.cores) == (3 * GIB, 5)


@pytest.mark.parametrize(
    ("file", "text", "limit"),
    [
        ("cpu.max", "50000 100000\n", 1),
        ("cpu.max", "100000 100000\n", 1),
        ("cpu.max", "max 100000\n", None),
        ("cpu/cpu.cfs_quota_us", "100000\n", 1),
        ("cpu/cpu.cfs_quota_us", "-1\n", None),
    ],
)
def test_a_quota_of_the_container_leaves_fewer_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, limit: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / file).write_text(text)
    assert cores(tmp_path) == (limit or 64)


def test_a_cpu_has_the_name_that_its_maker_gave_it(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: A CPU 9000\n\nprocessor\t: 1\n")
    assert cpu.model(told) == "A CPU 9000"
    assert cpu.model(tmp_path / "none") == (platform.processor() or platform.machine())


@pytest.mark.parametrize(("limit", "state"), [(8 * GIB, "ok"), (7 * GIB, "warn")])
def test_memory_is_held_against_the_plan(limit: int, state: State) -> None:
    assert capacity.memory(limit, NEEDS).state == state


@pytest.mark.parametrize(
    ("total", "workers", "state"),
    [(64 * 2**20, 2, "fail"), (64 * 2**20, 0, "warn"), (GIB, 2, "warn"), (2 * GIB, 2, "ok")],
)
def test_data_workers_need_shared_memory(total: int, workers: int, state: State) -> None:
    assert capacity.shared_memory(total, NEEDS, workers).state == state


@pytest.mark.parametrize(
    ("factor", "state"), [(0, "ok"), (10**6, "fail")], ids=["none needed", "too much"]
)
def test_disk_is_held_against_what_is_downloaded_and_made(
    tmp_path: Path, factor: int, state: State
) -> None:
    sizes = dataclasses.replace(
        SIZES, download=SIZES.download * factor, merged=SIZES.merged * factor, adapter=0
    )
    need = dataclasses.replace(NEEDS, cache=0, work=0)
    # One disk for both counts once, with the sum of what they need.
    check = one(capacity.disks(tmp_path / "cache", tmp_path / "work", (sizes, need)))
    assert (check.name, check.state) == ("disk", state)
    assert check.state == "ok" or "runtime.cache_dir" in check.fix


def test_a_small_job_needs_the_disk_that_its_own_rows_take(tmp_path: Path) -> None:
    picture = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64**2))
    lines = [json.dumps({"image": "a.png", "text": str(n)}) for n in range(60)]
    picture.save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))

    def found(*overrides: str) -> Check:
        text = (ROOT / "specs/latex.yaml").read_text()
        place = (f"runtime.cache_dir={tmp_path}/cache", f"output.uri={tmp_path}/out")
        loaded = load_spec(text, "latex", [*place, "data.eval=null", *overrides], {})
        subject = Subject.of(loaded)
        unknown = subject.data_bytes is None
        return one(
            capacity.disks(
                subject.cache_dir, subject.workdir, subject.measured(0), rows_unknown=unknown
            )
        )

    data = f"{{uri: {tmp_path}/rows.jsonl}}"
    own = found(f"data.train={data}", "data.instruction=Read it.", "data.eval_fraction=0.2")
    assert re.search(r"the plan needs 2\d\d\.\d MiB$", own.found)
    remote = found("data.train={uri: s3://bucket/rows.jsonl}", "data.eval_fraction=0.2")
    assert remote.found.endswith("42.0 GiB; rows that are not local are taken to be many")


def test_without_a_spec_a_disk_is_held_against_no_plan(tmp_path: Path) -> None:
    check = one(capacity.disks(tmp_path, tmp_path, None))
    assert (check.state, "the plan needs" in check.found) == ("ok", False)


def test_a_folder_that_may_not_be_written_is_not_told_to_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    check = one(capacity.disks(tmp_path / "cache", tmp_path / "work", None))
    assert check.state == "fail"
    assert "may not write" in check.found
    assert check.fix == (
        "set runtime.cache_dir to a folder that this user can write, or change its owner"
    )


def test_scratch_on_another_disk_is_looked_at_apart(tmp_path: Path) -> None:
    if not capacity.SHM.is_dir() or capacity.SHM.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk here")
    found = list(capacity.disks(tmp_path, capacity.SHM, (SIZES, NEEDS)))
    assert [check.name for check in found] == ["cache", "scratch"]


# --- accounts -------------------------------------------------------------------------------

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAPLANTED1234", "AWS_SECRET_ACCESS_KEY": "planted-secret-value"}


def answers(known: dict[str, tuple[int, str]]) -> Answer:
    return lambda path, body, headers: known.get(path, (404, ""))


@pytest.fixture
def no_accounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    return monkeypatch


def test_without_keys_only_public_buckets_can_be_read(no_accounts: pytest.MonkeyPatch) -> None:
    assert access.s3_identity().state == "warn"


def test_keys_for_a_store_of_ones_own_are_told_by_their_end(
    no_accounts: pytest.MonkeyPatch,
) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": "http://minio:9000"}.items():
        no_accounts.setenv(name, value)
    check = access.s3_identity()
    assert check.found == "key …1234 from env, for http://minio:9000"


@pytest.mark.parametrize(
    ("status", "body", "state", "text"),
    [
        (
            200,
            "<GetCallerIdentityResponse><GetCallerIdentityResult>"
            "<Arn>arn:aws:iam::111122223333:user/me</Arn>"
            "</GetCallerIdentityResult></GetCallerIdentityResponse>",
            "ok",
            "arn:aws:iam::111122223333:user/me (key …1234 from env)",
        ),
        (
            403,
            "<ErrorResponse><Error><Code>InvalidClientTokenId</Code></Error></ErrorResponse>",
            "fail",
            "refused: InvalidClientTokenId",
        ),
    ],
)
def test_amazon_says_whose_keys_they_are(
    no_accounts: pytest.MonkeyPatch, status: int, body: str, state: State, text: str
) -> None:
    with serving(answers({"/": (status, body)})) as address:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL_STS": address}.items():
            no_accounts.setenv(name, value)
        check = access.s3_identity()
    assert check.state == state
    assert text in check.found
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in check.found
    assert KEYS["AWS_ACCESS_KEY_ID"] not in check.found


def test_the_hub_says_whose_token_it_is(no_accounts: pytest.MonkeyPatch) -> None:
    whoami = '{"type": "user", "name": "somebody"}'
    with serving(answers({"/": (200, ""), "/api/whoami-v2": (200, whoami)})) as address:
        no_accounts.setenv("HF_ENDPOINT", address)
        no_accounts.setenv("HF_TOKEN", "hf_planted")
        found = {check.name: check for check in access.hub_checks(("hf://org/model",))}
    assert found["hub"].state == "ok"
    assert found["hub identity"].found == "somebody"


def test_a_refused_token_is_a_warning(no_accounts: pytest.MonkeyPatch) -> None:
    with serving(answers({"/": (200, ""), "/api/whoami-v2": (401, "")})) as address:
        no_accounts.setenv("HF_ENDPOINT", address)
        no_accounts.setenv("HF_TOKEN", "hf_planted")
        found = {check.name: check for check in access.hub_checks(("hf://org/model",))}
    assert found["hub identity"].state == "warn"
    assert "hf_planted" not in found["hub identity"].found


@pytest.mark.parametrize(("needed", "state"), [(True, "fail"), (False, "note")])
def test_a_hub_that_is_away_fails_where_it_is_needed(
    no_accounts: pytest.MonkeyPatch, needed: bool, state: State
) -> None:
    no_accounts.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert one(access.hub_checks(("hf://org/model",) if needed else ())).state == state

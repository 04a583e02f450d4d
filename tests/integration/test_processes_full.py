"""Two processes that fine-tune all weights, each with its shards of them, of gradients and of
optimizer states: what one process trains, with checkpoints that no process ever holds whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.distributed import TCPStore

from job import storage
from job.cli.app import app
from tests.conftest import S3
from tests.integration.test_processes import (
    SECONDS,
    SETTINGS,
    Pair,
    arguments,
    of_torchrun,
    torchrun,
    trained_steps,
    validations,
)
from tests.jobs import FULL, UNVALIDATED, read_json, sets

pytestmark = pytest.mark.slow(minutes=4)

WEIGHTS = {
    **FULL,
    "train.learning_rate": 1e-3,
    "train.loraplus_lr_ratio": "null",
    "train.metric_for_best_model": "eval_loss",
    "export.merged.enabled": "true",
    "export.verify": "reload",
}

ADAPTER = {"train.metric_for_best_model": "eval_loss"}
SHARDED = {"runtime.distributed": "fsdp2"}
PICTURED, SEED = (1, 6, 7), 3
"""Rows with an image, and a seed with which the first and last of four steps have one, and the two
between have none."""

DIES_IN_THE_SECOND_CHECKPOINT = """
import os, signal
import torch.distributed as dist
from job.train.checkpoint import shard_files
store = shard_files.store_optimizer
def dying(model, optimizer, checkpoint):
    if checkpoint.name == "checkpoint-4" and dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return store(model, optimizer, checkpoint)
shard_files.store_optimizer = dying
from job.__main__ import main
main()
"""
"""In the process with the last rank."""

COUNTS_WEIGHTS = """
import gc, json, os
import torch
from pathlib import Path
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from job.engines.trainer import StepTrainer
from job.families import stored_weights
from job.train import train as training

counted = {"most": 0}


def count():
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and not each.is_meta:
            own = each._local_tensor if isinstance(each, DTensor) else each
            storages[own.untyped_storage().data_ptr()] = own.untyped_storage().nbytes()
    counted["most"] = max(counted["most"], sum(storages.values()))


def counting(owner, name, after):
    function = getattr(owner, name)

    def counted_function(*args, **kwargs):
        count()
        result = function(*args, **kwargs)
        after(result, *args)
        return result

    setattr(owner, name, counted_function)


def sizes(result, trainer, *_):
    weights = list(trainer.model.parameters())
    counted["whole"] = sum(each.numel() * each.itemsize for each in weights)
    counted["sharded"] = all(isinstance(each, DTensor) for each in weights)
    count()
    Path(f"{FOLDER}/{os.environ['PET_NODE_RANK']}.json").write_text(json.dumps(counted))


counting(training, "adapt", lambda *_: count())
counting(FSDPParamGroup, "__init__", lambda *_: count())
counting(stored_weights.StoredWeights, "rows", lambda *_: count())
counting(StepTrainer, "_prepare_for_training", sizes)
from job.__main__ import main
main()
"""
"""Counts the bytes of all tensors in memory before the first step, while it loads and shards."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training of one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    app(["train", *arguments(output, 4, 1, **WEIGHTS)[1:]], standalone_mode=False)
    return output


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole job of two processes on one machine."""
    output = tmp_path_factory.mktemp("together") / "out"
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = arguments(output, 1, 2, **WEIGHTS, **SHARDED)
    both = Pair(given, given, port=store.port, variables=of_torchrun)
    assert both.end() == (0, 0), both.said
    assert "Warning" not in "".join(both.said)
    return output


def weights(output: Path) -> dict[str, Any]:
    return dict(load_file(output / "weights" / "model.safetensors"))


def test_two_processes_train_all_weights_as_one_does(alone: Path, together: Path) -> None:
    assert len(trained_steps(alone)) == SETTINGS["train.max_steps"]
    for mine, other in zip(trained_steps(together), trained_steps(alone), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["learning_rates"] == other["learning_rates"]
    for step, other in validations(alone).items():
        found = validations(together)[step]["eval_loss"]
        assert found == pytest.approx(other["eval_loss"], rel=1e-4)
    kept = read_json(together / "run.json")["validation"]["exported_step"]
    assert kept == read_json(alone / "run.json")["validation"]["exported_step"] == 2
    trained, expected = weights(together), weights(alone)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        assert trained[name].dtype == tensor.dtype
        assert float((trained[name] - tensor).abs().max()) < 2e-4, name


def test_the_trained_weights_are_exported_with_a_proof(together: Path) -> None:
    proof = read_json(together / "merged" / "export.json")
    assert proof["tensors"] == proof["tensors_checked"] > 0
    assert proof["merged_reloaded"] is not None
    assert (together / "_SUCCESS").exists()


def test_a_checkpoint_has_the_shards_of_each_process(together: Path) -> None:
    manifest = read_json(together / "checkpoints" / "step-4" / "manifest.json")
    stored = {file["path"] for file in manifest["files"]}
    for folder in ("weights", "states"):
        sizes = [
            next(file["size"] for file in manifest["files"] if file["path"] == path)
            for rank in range(2)
            if (path := f"{folder}/rank-{rank}/model.safetensors") in stored
        ]
        assert len(sizes) == 2
        assert max(sizes) < 1.1 * min(sizes)
    assert "model.safetensors" not in stored


@pytest.mark.parametrize("settings", [WEIGHTS, ADAPTER], ids=["all weights", "an adapter"])
def test_no_process_ever_holds_the_whole_model(settings: dict[str, Any], tmp_path: Path) -> None:
    given = ["train", *arguments(tmp_path / "out", 1, 2, **settings, **SHARDED)[1:]]
    code = COUNTS_WEIGHTS.replace("{FOLDER}", str(tmp_path))
    both = Pair(given, given, codes=(code, code))

    assert both.end() == (0, 0), both.said
    for rank in range(2):
        counted = read_json(tmp_path / f"{rank}.json")
        assert counted["sharded"]
        assert counted["whole"] / 2 < counted["most"] < 0.8 * counted["whole"]


def test_a_process_that_dies_in_a_checkpoint_leaves_the_one_before_to_resume_from(
    together: Path, tmp_path: Path
) -> None:
    """On two machines, so with uploads from both; resumed, it ends bit-equal."""
    output = tmp_path / "out"
    given = arguments(output, 1, 2, **WEIGHTS, **SHARDED)
    given = ["train", *given[1:]]
    both = Pair(given, given, codes=(None, DIES_IN_THE_SECOND_CHECKPOINT))
    assert both.end() == (70, -9), both.said
    assert "rank 1: has died or is unreachable" in both.said[0]
    manifests = [path.parent.name for path in (output / "checkpoints").glob("*/manifest.json")]
    assert manifests == ["step-2"]

    both = Pair(given, given)
    assert both.end() == (0, 0), both.said
    assert both.said[0].count("resuming step=2") == 1
    for step in (4, 5):
        for folder in ("weights", "states"):
            for rank in range(2):
                path = f"checkpoints/step-{step}/{folder}/rank-{rank}/model.safetensors"
                assert (output / path).read_bytes() == (together / path).read_bytes(), path
    assert weights(output).keys() == weights(together).keys()
    for name, tensor in weights(output).items():
        assert tensor.equal(weights(together)[name]), name


def test_four_processes_go_on_from_shards_in_a_bucket_and_export_what_they_trained(
    s3: S3, alone: Path, tmp_path: Path
) -> None:
    """The last of four that torchrun started dies in a checkpoint."""
    dying = tmp_path / "dying.py"
    dying.write_text(DIES_IN_THE_SECOND_CHECKPOINT)
    given = arguments(tmp_path / "out", 1, 1, **WEIGHTS, **SHARDED)
    given[given.index("--output") + 1] = s3.uri("out")

    process = torchrun("run", given, processes=4, program=[str(dying)])
    said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode != 0
    stored = {entry.path for entry in storage.list_files(s3.uri("out/checkpoints"))}
    assert {path for path in stored if path.endswith("/manifest.json")} == {"step-2/manifest.json"}
    for rank in range(4):
        for folder in ("weights", "states"):
            assert f"step-2/{folder}/rank-{rank}/model.safetensors" in stored, said

    process = torchrun("run", given, processes=4)
    said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0, said
    assert said.count("resuming step=2") == 1
    kept = storage.read_text(s3.uri("out/train/history.jsonl")).splitlines()
    steps = [entry for entry in map(json.loads, kept) if "loss" in entry]
    for mine, other in zip(steps, trained_steps(alone), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)
    proof = json.loads(storage.read_text(s3.uri("out/merged/export.json")))
    assert proof["tensors"] == proof["tensors_checked"] > 0
    assert storage.exists(s3.uri("out/_SUCCESS"))


def test_rows_without_images_train_as_in_one_process(tmp_path: Path) -> None:
    """A process without an image in its rows of a step reduces gradients all the same; in a step
    without any, the weights of images stay as they are."""
    rows = []
    for number in range(12):
        text: dict[str, str] = {"type": "text", "text": f"Name row {number}."}
        asked = [text]
        if number in PICTURED:
            Image.new("L", (112, 56), 20 * number).save(tmp_path / f"{number}.png")
            asked = [{"type": "image", "image": f"{number}.png"}, text]
        answer = {"role": "assistant", "content": [{"type": "text", "text": str(number)}]}
        rows.append({"messages": [{"role": "user", "content": asked}, answer]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    source = {"uri": str(tmp_path / "rows.jsonl"), "columns": {"messages": "messages"}}
    settings = {
        **FULL,
        **UNVALIDATED,
        "data": json.dumps({"train": source, "eval_fraction": 0.1}),
        "train.max_steps": 4,
        "train.save_steps": 4,
        "train.logging_steps": 1,
        "train.router_aux_loss_coef": 0,
        "train.lr_scheduler_type": "constant",
        "train.learning_rate": 1e-3,
        "train.seed": SEED,
        "runtime.accelerator": "cpu",
        "runtime.cache_dir": tmp_path / "cache",
    }

    def given(output: str, **more: object) -> list[str]:
        out = str(tmp_path / output)
        return ["train", "specs/latex.yaml", "--output", out, *sets({**settings, **more})]

    rows_of = {"train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 1}
    app(given("alone", **rows_of), standalone_mode=False)
    sharded = given("out", **{**rows_of, "train.per_device_train_batch_size": 2}, **SHARDED)
    both = Pair(sharded, sharded)
    assert both.end() == (0, 0), both.said
    for mine, other in zip(
        trained_steps(tmp_path / "out"), trained_steps(tmp_path / "alone"), strict=True
    ):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    trained, expected = weights(tmp_path / "out"), weights(tmp_path / "alone")
    for name, tensor in expected.items():
        assert float((trained[name] - tensor).abs().max()) < 2e-4, name

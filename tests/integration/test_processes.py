"""Several processes that train one job: what one trains, written by one, ended as one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed import TCPStore

from job.cli.app import app
from tests.jobs import ROOT, read_json, sets, small_run, start
from tests.s3 import free_ports

# Ten rows, four a step: the third step of an epoch leaves one of two processes without a row. The
# balance of experts is a product of means over a forward pass, so it depends on how rows are cut.
SETTINGS = {
    "data.train.limit": 10,
    "data.eval.limit": 2,
    "eval.max_samples": 2,
    "train.max_steps": 5,
    "train.save_steps": 2,
    "train.save_total_limit": 5,
    "train.router_aux_loss_coef": 0,
    # Five rows to validate on, two a batch: one of two processes has a batch more. They are of the
    # font that the model can read already, so the first validation is the best.
    "data.validation.uri": "builtin://formulas",
    "data.validation.limit": 5,
    "data.validation.formulas.seed": 5,
    "data.validation.formulas.max_tokens": 12,
    "data.validation.formulas.width": 224,
    "train.per_device_eval_batch_size": 2,
    "train.eval_strategy": "steps",
    "train.eval_steps": 2,
    "train.metric_for_best_model": "exact_match",
    "train.load_best_model_at_end": "true",
    "train.loraplus_lr_ratio": 2,
    "train.vision_tower_lr": 5e-4,
    "runtime.accelerator": "cpu",
}
SHARDED = {"runtime.distributed": "fsdp2", "train.metric_for_best_model": "eval_loss"}
LAST = {"train.load_best_model_at_end": "false"}
LONG = {
    "train.max_steps": 500,
    "train.save_steps": 500,
    "train.eval_steps": 500,
    "train.num_train_epochs": 9,
}
SECONDS = 240
OUT_OF_MEMORY_IN_THE_FOURTH_STEP = """
import torch
from job.engines.trainer import StepTrainer
step = StepTrainer.training_step
def failing(trainer, *given):
    if trainer.state.global_step == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return step(trainer, *given)
StepTrainer.training_step = failing
from job.__main__ import main
main()
"""

NO_SPACE_IN_THE_SECOND_STEP = """
from job.engines.trainer import StepTrainer
step = StepTrainer.training_step
def failing(trainer, *given):
    if trainer.state.global_step == 1:
        raise OSError(28, "No space left on device")
    return step(trainer, *given)
StepTrainer.training_step = failing
from job.__main__ import main
main()
"""


def arguments(output: Path, rows: int, passes: int, **more: object) -> list[str]:
    settings = {
        **SETTINGS,
        "train.per_device_train_batch_size": rows,
        "train.gradient_accumulation_steps": passes,
        **more,
    }
    return small_run(str(output), *sets(settings), cache=output.parent / f"cache-{output.name}")


def torchrun(
    command: str,
    given: list[str],
    *,
    processes: int = 2,
    program: Sequence[str] = ("-m", "job"),
) -> subprocess.Popen[str]:
    [port] = free_ports(1)
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *program, command, *given[1:]],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def of_a_pod(rank: int, port: int) -> dict[str, str]:
    """What Kubeflow Trainer sets in a pod of one process."""
    return {
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def of_torchrun(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets; the store at the port is its own."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1",
    }


class Pair:
    """Two processes of one job, without a launcher; by default as in two pods."""

    def __init__(
        self,
        *given: list[str],
        port: int | None = None,
        variables: Callable[[int, int], dict[str, str]] = of_a_pod,
        codes: Sequence[str | None] = (None, None),
    ) -> None:
        """`codes` are what a process runs instead of the job's own command, if not None."""
        port = free_ports(1)[0] if port is None else port
        self.said = ["", ""]
        self.processes = [
            start(*own, environ=variables(rank, port), code=code)
            for rank, (own, code) in enumerate(zip(given, codes, strict=True))
        ]

    def wait_for(self, text: str) -> None:
        """Reads what rank 0 says until the text is in it."""
        for line in self.processes[0].stderr or ():
            self.said[0] += line
            if text in line:
                return
        raise AssertionError(f"rank 0 never said {text!r}:\n{self.said}")

    def end(self) -> tuple[int, int]:
        """The exit codes, once both have left."""
        for rank, process in enumerate(self.processes):
            self.said[rank] += process.communicate(timeout=SECONDS)[1]
        first, second = (process.wait() for process in self.processes)
        return first, second

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture
def pair() -> Iterator[Any]:
    started = []

    def make(*given: list[str], **more: Any) -> Pair:
        started.append(Pair(*(["train", *own[1:]] for own in given), **more))
        return started[-1]

    yield make
    for each in started:
        each.kill()


def history(output: Path) -> list[dict[str, float]]:
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trained_steps(output: Path) -> list[dict[str, float]]:
    return [entry for entry in history(output) if "loss" in entry]


def validations(output: Path) -> dict[float, dict[str, float]]:
    return {entry["step"]: entry for entry in history(output) if "eval_loss" in entry}


def adapter(output: Path) -> dict[str, Any]:
    return dict(load_file(output / "adapter" / "adapter_model.safetensors"))


def same_training(found: Path, expected: Path) -> None:
    """The losses, the gradients' norms and the adapter are equal within fp32's rounding."""
    assert len(trained_steps(expected)) == SETTINGS["train.max_steps"]
    for mine, other in zip(trained_steps(found), trained_steps(expected), strict=True):
        assert mine["step"] == other["step"]
        assert mine["learning_rate"] == other["learning_rate"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    trained, wanted = adapter(found), adapter(expected)
    assert trained.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert trained[name].shape == tensor.shape
        moved = float((trained[name] - tensor).abs().max())
        assert moved < 2e-4, f"{name}: {moved}"  # a tenth of one step's learning rate


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that takes the rows of a step at once."""
    output = tmp_path_factory.mktemp("alone") / "out"
    app(["train", *arguments(output, 4, 1)[1:]], standalone_mode=False)
    return output


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole job of two processes, each of which takes a row at a time; and what it said."""
    output = tmp_path_factory.mktemp("together") / "out"
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = arguments(output, 1, 2)
    both = Pair(given, given, port=store.port, variables=of_torchrun)
    assert both.end() == (0, 0), both.said
    return output, "".join(both.said)


@pytest.mark.slow
def test_torchrun_starts_a_whole_job_as_the_variables_that_it_sets_do(
    together: tuple[Path, str], tmp_path: Path
) -> None:
    process = torchrun("run", arguments(tmp_path / "out", 1, 2))
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert "Warning" not in said
    assert said.count("done output=") == 1
    same_training(tmp_path / "out", together[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "passes", "more"),
    [
        pytest.param(1, 4, {}, id="a row a pass"),
        pytest.param(2, 2, {}, id="by length"),
        pytest.param(2, 2, {"train.group_by_length": "false"}, id="in order"),
        pytest.param(2, 2, {"train.padding_free": "false"}, id="by length, padded"),
    ],
)
def test_a_step_in_several_forward_passes_is_the_step_at_once(
    alone: Path, tmp_path: Path, rows: int, passes: int, more: dict[str, object]
) -> None:
    app(["train", *arguments(tmp_path / "out", rows, passes, **more)[1:]], standalone_mode=False)
    same_training(tmp_path / "out", alone)


def test_two_processes_train_what_one_does(alone: Path, together: tuple[Path, str]) -> None:
    same_training(together[0], alone)
    mine, others = validations(together[0]), validations(alone)
    assert [*mine] == [*others] == [2, 4, 5]
    for step, other in others.items():
        assert mine[step]["eval_loss"] == pytest.approx(other["eval_loss"], rel=2e-5)
        assert mine[step]["eval_cer"] == other["eval_cer"]
    for output in (together[0], alone):
        assert read_json(output / "run.json")["validation"]["exported_step"] == 2
    tokens = [
        read_json(output / "run.json")["stages"]["train"]["summary"]["tokens"]
        for output in (together[0], alone)
    ]
    assert tokens[0] == tokens[1] > 0


@pytest.mark.slow
def test_two_processes_that_share_each_layer_train_what_one_does(
    alone: Path, pair: Any, tmp_path: Path
) -> None:
    given = arguments(tmp_path / "out", 2, 1, **SHARDED, **LAST)
    both = pair(given, given)
    assert both.end() == (0, 0), both.said
    shutil.copytree(alone, tmp_path / "alone")
    app(["train", *arguments(tmp_path / "alone", 4, 1, **LAST)[1:]], standalone_mode=False)
    same_training(tmp_path / "out", tmp_path / "alone")
    for step, other in validations(alone).items():
        found = validations(tmp_path / "out")[step]["eval_loss"]
        assert found == pytest.approx(other["eval_loss"], rel=2e-5)


def test_rank_0_alone_speaks_and_writes_a_whole_job(together: tuple[Path, str]) -> None:
    output, said = together
    for once in ("processes joined processes=2", "prep: done", "train: done", "done output="):
        assert said.count(once) == 1, said
    assert said.count("checkpoint stored step=4") == 1
    assert "Warning" not in said
    assert (output / "_SUCCESS").exists()
    run = read_json(output / "run.json")
    assert run["status"] == "succeeded"
    assert run["throughput"]["processes"] == 2
    assert run["throughput"]["rows_a_step"] == 4


def test_a_complete_training_of_two_is_not_made_again_by_one(
    together: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same spec in one process takes half the rows a step, but asks for the same result."""
    output = Path(shutil.copytree(together[0], tmp_path / "out"))
    (output / ".stages" / "eval.json").unlink()
    plan = ["plan", *arguments(output, 1, 2)[1:], "--format", "json"]
    app([*plan, "--processes", "2"], standalone_mode=False)
    printed = capsys.readouterr()
    assert "will be skipped" in json.loads(printed.out)["stages"]["train"]
    assert "made_by" not in printed.err
    app(plan, standalone_mode=False)
    planned = json.loads(capsys.readouterr().out)
    assert planned["steps"]["rows_a_step"] == 2  # of this start, not of the training that is kept
    stages = planned["stages"]
    assert "will be skipped" in stages["train"]
    assert "will be skipped" in stages["export"]
    assert stages["eval"] == "will run"

    app(["run", *arguments(output, 1, 2)[1:]], standalone_mode=False)
    said = capsys.readouterr().err
    assert "made_by=2 now=1" in said
    assert "train: complete, skipped" in said
    assert "export: complete, skipped" in said
    assert "eval: done" in said
    for name, tensor in adapter(together[0]).items():
        assert adapter(output)[name].equal(tensor), name

    # Damaged, or of other settings, it is made again, with the rows of this start.
    app(["train", *arguments(output, 2, 2)[1:]], standalone_mode=False)
    assert "now=1" not in capsys.readouterr().err
    (output / "adapter" / "adapter_model.safetensors").unlink()
    app(["train", *arguments(output, 1, 2)[1:]], standalone_mode=False)
    said = capsys.readouterr().err
    assert "now=1" not in said
    summary = read_json(output / ".stages" / "train.json")["summary"]
    assert (summary["processes"], summary["rows_a_step"]) == (1, 2)


@pytest.mark.slow(minutes=1)
def test_a_resumed_training_of_two_is_bit_equal_and_one_process_may_go_on_with_it(
    together: tuple[Path, str], pair: Any, tmp_path: Path
) -> None:
    found = {}
    for processes in (2, 1):
        output = Path(shutil.copytree(together[0], tmp_path / f"out-{processes}"))
        (output / ".stages" / "train.json").unlink()
        shutil.rmtree(output / "adapter")
        for step in (4, 5):
            shutil.rmtree(output / "checkpoints" / f"step-{step}")
        if processes == 2:
            given = arguments(output, 1, 2)
            both = pair(given, given)
            assert both.end() == (0, 0), both.said
            assert both.said[0].count("resuming step=2") == 1
        else:
            app(["train", *arguments(output, 2, 2)[1:]], standalone_mode=False)
        found[processes] = output
    for name, tensor in adapter(together[0]).items():
        assert adapter(found[2])[name].equal(tensor), name
    assert read_json(found[1] / "run.json")["stages"]["train"]["summary"]["resumed_from_step"] == 2
    same_training(found[1], together[0])


@pytest.mark.slow(minutes=1)
def test_a_resumed_training_in_shares_is_bit_equal(pair: Any, tmp_path: Path) -> None:
    trained = dict[Path, dict[str, Any]]()
    for output in (tmp_path / "out", tmp_path / "again"):
        if trained:
            shutil.copytree(tmp_path / "out", output)
            (output / ".stages" / "train.json").unlink()
            shutil.rmtree(output / "adapter")
            for step in (4, 5):
                shutil.rmtree(output / "checkpoints" / f"step-{step}")
        given = arguments(output, 1, 2, **SHARDED)
        both = pair(given, given)
        assert both.end() == (0, 0), both.said
        assert both.said[0].count("resuming step=2") == len(trained)
        trained[output] = adapter(output)
        kept = read_json(output / "run.json")["validation"]["exported_step"]
        stored = load_file(output / f"checkpoints/step-{kept}/adapter_model.safetensors")
        assert kept < SETTINGS["train.max_steps"]
        assert all(tensor.equal(stored[name]) for name, tensor in trained[output].items())
    first, again = trained.values()
    for name, tensor in first.items():
        assert again[name].equal(tensor), name


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param((0,), id="rank 0", marks=pytest.mark.slow),
        pytest.param((1,), id="rank 1"),
        pytest.param((0, 1), id="both", marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_any_process_stops_all_with_one_checkpoint(
    pair: Any, tmp_path: Path, asked: tuple[int, ...]
) -> None:
    given = arguments(tmp_path / "out", 1, 2, **LONG)
    both = pair(given, given)
    both.wait_for("train step=2/")
    for rank in asked:
        both.processes[rank].send_signal(signal.SIGTERM)
    assert both.end() == (143, 143), both.said
    assert both.said[0].count("checkpoint stored") == 1
    assert both.said[1] == ""
    assert len(list((tmp_path / "out" / "checkpoints").glob("step-*/manifest.json"))) == 1
    assert read_json(tmp_path / "out" / "run.json")["status"] == "preempted"


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_with_its_name(pair: Any, tmp_path: Path) -> None:
    given = arguments(tmp_path / "out", 1, 2, **LONG)
    both = pair(given, given)
    both.wait_for("train step=2/")
    both.processes[1].kill()
    sent = time.monotonic()
    assert both.end() == (70, -9), both.said
    assert time.monotonic() - sent < 60
    assert "rank 1: has died or is unreachable" in both.said[0]
    assert "fix: " in both.said[0]
    assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_launcher_that_stops_the_others_does_not_hide_which_process_died(
    pair: Any, tmp_path: Path, dead: int
) -> None:
    """torchrun sends SIGTERM at once, its store stays, and it kills after 30 seconds."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = arguments(tmp_path / "out", 1, 2, **LONG)
    both = pair(given, given, port=store.port, variables=of_torchrun)
    both.wait_for("train step=2/")
    both.processes[dead].kill()
    time.sleep(0.2)
    both.processes[1 - dead].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    codes = both.end()
    assert codes[dead] == -9
    assert codes[1 - dead] == 70, both.said
    assert time.monotonic() - sent < 25
    assert f"rank {dead}: has died or is unreachable" in both.said[1 - dead]
    if dead:
        assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"


@pytest.mark.slow
def test_rank_0_that_dies_ends_the_other(pair: Any, tmp_path: Path) -> None:
    given = arguments(tmp_path / "out", 1, 2, **LONG)
    both = pair(given, given)
    both.wait_for("prep: started")
    both.processes[0].kill()
    assert both.end() == (-9, 70), both.said
    assert "rank 0: has died or is unreachable" in both.said[1]


def test_an_error_of_rank_0_is_told_once_and_ends_all_with_its_code(
    pair: Any, tmp_path: Path
) -> None:
    missing = {"model.model_name_or_path": "/nowhere/model"}
    given = arguments(tmp_path / "out", 1, 2, **missing)
    both = pair(given, given)
    assert both.end() == (12, 12), both.said
    assert "/nowhere/model" in both.said[0]
    assert both.said[1] == ""


def test_an_error_of_another_rank_is_told_by_rank_0(pair: Any, tmp_path: Path) -> None:
    both = pair(
        arguments(tmp_path / "out", 1, 2),
        arguments(tmp_path / "out", 1, 2, **{"runtime.accelerator": "rocm"}),
    )
    assert both.end() == (10, 10), both.said
    assert "invalid spec, in rank 1" in both.said[0]
    assert "$.runtime.accelerator" in both.said[0]
    assert "train: started" not in both.said[0]  # before rank 0 has prepared and evaluated
    assert both.said[1] == ""
    assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"


def test_a_full_disk_of_another_rank_is_told_with_its_folder(pair: Any, tmp_path: Path) -> None:
    given = arguments(tmp_path / "out", 1, 2)
    both = pair(given, given, codes=(None, NO_SPACE_IN_THE_SECOND_STEP))
    assert both.end() == (21, 21), both.said
    assert "storage failed, in rank 1" in both.said[0]
    assert f"{tmp_path / 'cache-out' / 'work'}/" in both.said[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_ends_all_and_the_next_start_goes_on(
    pair: Any, tmp_path: Path, kind: str
) -> None:
    given = arguments(tmp_path / "out", 1, 2, **(SHARDED if kind == "fsdp2" else {}))
    both = pair(given, given, codes=(None, OUT_OF_MEMORY_IN_THE_FOURTH_STEP))
    assert both.end() == (20, 20), both.said
    assert both.said[0].count("out of memory, in rank 1") == 1
    assert "does not fit into the" in both.said[0]
    assert "fix: " in both.said[0]
    assert "fix: " not in both.said[1]
    assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"
    kept = [path.parent.name for path in (tmp_path / "out" / "checkpoints").glob("*/manifest.json")]
    assert kept == ["step-2"]
    both = pair(given, given)
    assert both.end() == (0, 0), both.said
    assert both.said[0].count("resuming step=2") == 1
    assert len(trained_steps(tmp_path / "out")) == SETTINGS["train.max_steps"]


@pytest.mark.slow
def test_processes_of_different_specs_do_not_train_together(pair: Any, tmp_path: Path) -> None:
    both = pair(
        arguments(tmp_path / "out", 1, 2),
        arguments(tmp_path / "out", 1, 2, **{"train.learning_rate": 0.25}),
    )
    assert both.end() == (70, 70), both.said
    assert "rank 1: has a different spec or version of the job than rank 0" in "".join(both.said)
    assert not (tmp_path / "out" / "adapter").exists()

"""A checkpoint's content, its checks, and resuming from it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments, set_seed

from job.engines.data_timer import DataTimer
from job.engines.parameter_groups import LearningRates
from job.spec.load import load_spec
from job.train.checkpoint import state_files
from job.train.checkpoint.contents import resume_problem
from job.train.checkpoint.resume import optimizer_to_resume
from job.train.checkpoint.safetensors_trainer import SafetensorsTrainer
from job.train.checkpoint.storage import CheckpointStore
from job.train.sampler import DistributedBatchSampler, shuffled

ROWS = 16
AN_EPOCH = 4
"""In steps: micro-batches of two rows, two of them per step."""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 1)
        self.idle = torch.nn.Linear(2, 2)
        """Used by no row."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(loss=((self.second(self.first(input_ids)) - 2) ** 2).mean())


def collate(rows: list[int]) -> dict[str, Any]:
    values = torch.tensor(rows, dtype=torch.float)[:, None] * torch.ones(4) / ROWS
    return {"input_ids": values, "counted_tokens": len(rows), "tokens": sum(rows), "images": 0}


class StopAt(TrainerCallback):
    """Saves and stops after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            control.should_save = control.should_training_stop = True


def training(
    place: Path,
    *,
    lora: bool = True,
    stop: int = 0,
    rates: LearningRates | None = None,
    **arguments: Any,
) -> Any:
    set_seed(1)
    model: Any = Net()
    if lora:
        targets = ["first", "second", "idle"]
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.3, target_modules=targets))
    asked = {"learning_rate": 0.1, "max_steps": 10, "lr_scheduler_type": "constant", **arguments}
    return SafetensorsTrainer(
        batch_sampler=DistributedBatchSampler(shuffled(ROWS, 0), 2, micro_batches=2),
        data_timer=DataTimer(),
        learning_rates=rates,
        model=model,
        args=TrainingArguments(
            output_dir=str(place),
            use_cpu=True,
            gradient_accumulation_steps=2,
            report_to="none",
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
            seed=3,
            **{"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, **asked},
        ),
        train_dataset=list(range(ROWS)),
        data_collator=collate,
        callbacks=[StopAt(stop)] if stop else [],
    )


def losses(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Any) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = training(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def checkpoint_of(trainer: Any, step: int) -> str:
    return str(Path(trainer.args.output_dir, f"checkpoint-{step}"))


@pytest.mark.parametrize("step", [3, 6, 9, 10])
def test_a_training_goes_on_to_the_same_weights_and_losses(
    whole: Any, step: int, tmp_path: Path
) -> None:
    resumed = training(tmp_path)
    resumed.train(checkpoint_of(whole, step))
    assert weights(resumed) == weights(whole)
    assert losses(resumed) == losses(whole)
    assert resumed.state.global_step == 10


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 5},
        {"max_steps": AN_EPOCH},
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": 2},
    ],
)
def test_a_training_at_its_last_step_or_past_it_trains_nothing(
    tmp_path: Path, length: dict[str, Any]
) -> None:
    trained = training(tmp_path / "a", **length)
    trained.train()
    last = trained.state.max_steps
    resumed = training(tmp_path / "b", **length)
    resumed.train(checkpoint_of(trained, last))
    assert (resumed.state.global_step, resumed.state.max_steps) == (last, last)
    assert weights(resumed) == weights(trained)
    assert losses(resumed) == losses(trained)
    shorter = training(tmp_path / "c", max_steps=1)
    shorter.train(checkpoint_of(trained, last))
    assert shorter.state.global_step == last
    assert weights(shorter) == weights(trained)


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_stop_between_two_logs_leaves_no_trace_in_them(
    whole: Any, stop: int, tmp_path: Path
) -> None:
    stopped = training(tmp_path / "a", stop=stop)
    stopped.train()
    assert stopped.state.global_step == stop
    resumed = training(tmp_path / "b")
    resumed.train(checkpoint_of(stopped, stop))
    assert losses(resumed) == losses(whole)
    assert weights(resumed) == weights(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_dropout_draws_depends_on_neither_workers_nor_the_number_of_iterators(
    whole: Any, workers: int, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
    }
    trainer = training(tmp_path / "a", **given)
    before = torch.get_rng_state()
    for _ in range(2):
        assert len(list(trainer.get_train_dataloader())) == 2 * AN_EPOCH
    assert torch.equal(torch.get_rng_state(), before)
    resumed = training(tmp_path / "b", **given)
    resumed.train(checkpoint_of(whole, 3))  # through two more epochs
    assert weights(resumed) == weights(whole)


def test_checkpoints_of_two_equal_trainings_are_equal_files(whole: Any, tmp_path: Path) -> None:
    again = training(tmp_path)
    again.train()
    for step in (3, 6, 9, 10):
        one, other = (Path(checkpoint_of(each, step)) for each in (whole, again))
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in other.iterdir())
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_steps_between_logs_and_saves_are_as_the_spec_says_now(whole: Any, tmp_path: Path) -> None:
    resumed = training(tmp_path, save_steps=4, logging_steps=1)
    resumed.train(checkpoint_of(whole, 6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-8"]
    assert [entry["step"] for entry in losses(resumed)][-4:] == [7, 8, 9, 10]


def test_rates_and_decay_are_as_the_spec_says_now(whole: Any, tmp_path: Path) -> None:
    resumed = training(
        tmp_path, learning_rate=0.05, weight_decay=0.25, lr_scheduler_type="linear", max_steps=12
    )
    resumed.train(checkpoint_of(whole, 6))
    rates = {entry["step"]: entry["learning_rate"] for entry in losses(resumed)}
    assert rates[6] == 0.1
    assert rates[8] == pytest.approx(0.05 * (12 - 7) / 12)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.25


def reshape(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def change(path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    """Damages tensors, a state or JSON of a checkpoint's file."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        damage(tensors)
        save_file(tensors, path)
    elif path.suffix == ".json":
        value = json.loads(path.read_text())
        damage(value)
        path.write_text(json.dumps(value))
    else:
        state = state_files.load(path)
        damage(state)
        state_files.save(state, path)


ADAPTER = "adapter_model.safetensors"
DOWN = "base_model.model.first.lora_A.weight"


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (
            ADAPTER,
            reshape(DOWN, (2, 5)),
            f"{DOWN} has the shape [2, 5], but this training needs [2, 4]",
        ),
        (ADAPTER, lambda t: t.pop(DOWN), f"{DOWN} is missing"),
        (ADAPTER, lambda t: [t.pop(k) for k in list(t)[:2]], "and 1 more are missing"),
        (ADAPTER, reshape("strange", (1,)), "strange is not of this model"),
        (ADAPTER, lambda t: t.update({DOWN: t[DOWN].half()}), "is torch.float16, but this"),
        ("optimizer.safetensors", lambda t: t.pop("state.state.0.exp_avg"), "cannot be read"),
        (
            "optimizer",
            lambda s: s["state"][0].pop("exp_avg_sq"),
            "in the state of parameter 0, exp_avg_sq is missing",
        ),
        ("optimizer", lambda s: s["state"].pop(1), "the state of parameter 1 is missing"),
        (
            "optimizer",
            lambda s: s["state"][0].update(exp_avg=torch.zeros(3)),
            "exp_avg of 0 has the shape [3], but this training needs [2, 4]",
        ),
        (
            "optimizer",
            lambda s: s["state"][0].update(exp_avg=torch.zeros(2, 4).double()),
            "exp_avg of 0 is torch.float64",
        ),
        ("optimizer", lambda s: s["state"].update({9: s["state"][0]}), "9 is not of this model"),
        ("optimizer", lambda s: s["param_groups"][0]["params"].pop(), "groups have [5, 0]"),
        ("optimizer", lambda s: s.update(kind="Adafactor"), "it belongs to Adafactor, but this"),
        ("scheduler", lambda s: s.update(last_epoch=5), "it is at step 5, but the checkpoint at 6"),
        ("scheduler", lambda s: s.update(base_lrs=[0.1]), "base_lrs is [0.1]"),
        ("rng_state", lambda s: s.update(torch=s["torch"][:9]), "rng_state cannot be read"),
        ("rng_state", lambda s: s.pop("numpy"), "rng_state cannot be read: KeyError: 'numpy'"),
        (
            "trainer_state.json",
            lambda s: s.update(global_step="six"),
            "lacks the step",
        ),
        ("trainer_state.json", lambda s: s.update(strange=1), "trainer_state.json cannot be read"),
    ],
)
def test_what_a_checkpoint_holds_is_compared_with_the_training(
    whole: Any, tmp_path: Path, file: str, damage: Any, said: str
) -> None:
    copy = Path(shutil.copytree(checkpoint_of(whole, 6), tmp_path / "checkpoint-6"))
    trainer = training(tmp_path / "trainer")
    assert resume_problem(copy, trainer) is None
    before = weights(trainer)
    change(copy / file, damage)
    found = resume_problem(copy, trainer)
    assert found is not None
    assert said in found
    assert file.partition(".")[0] in found
    assert weights(trainer) == before


@pytest.mark.parametrize(
    "file",
    [
        ADAPTER,
        *(
            f"{name}{end}"
            for name in ("optimizer", "scheduler")
            for end in (".json", ".safetensors")
        ),
        "rng_state.json",
        "rng_state.safetensors",
        "trainer_state.json",
    ],
)
def test_a_file_that_is_missing_or_of_other_content_is_a_reason_and_no_error(
    whole: Any, tmp_path: Path, file: str
) -> None:
    copy = Path(shutil.copytree(checkpoint_of(whole, 6), tmp_path / "checkpoint-6"))
    trainer = training(tmp_path / "trainer")
    for content in (None, b"", b"{}", b"\xff\x00[["):
        (copy / file).unlink()
        if content is not None:
            (copy / file).write_bytes(content)
        found = resume_problem(copy, trainer)
        assert found is not None
        assert file.partition(".")[0] in found
        (copy / file).write_bytes(b"")


def test_weights_that_are_trained_themselves_are_compared_too(tmp_path: Path) -> None:
    full = training(tmp_path / "full", lora=False)
    full.train()
    checkpoint = Path(checkpoint_of(full, 6))
    assert resume_problem(checkpoint, full) is None
    change(checkpoint / "model.safetensors", lambda tensors: tensors.pop("first.weight"))
    assert resume_problem(checkpoint, full) == "model.safetensors: first.weight is missing"


def test_groups_of_weights_with_other_learning_rates_are_named(whole: Any, tmp_path: Path) -> None:
    rates = LearningRates(base=0.1, loraplus_lr_ratio=2)
    trained = training(tmp_path / "trained", rates=rates)
    trained.train()
    checkpoint = Path(checkpoint_of(trained, 6))
    again = training(tmp_path / "again", rates=rates)
    assert resume_problem(checkpoint, again) is None
    again.train(str(checkpoint))
    assert weights(again) == weights(trained) != weights(whole)
    assert losses(again) == losses(trained)
    said = resume_problem(checkpoint, training(tmp_path / "other"))
    assert said is not None
    assert "its parameter groups are ['base', 'lora_B'], but this training's are [None" in said


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch_fused"])
def test_every_optimizer_s_own_state_is_taken_and_another_s_is_not(
    whole: Any, tmp_path: Path, optim: str
) -> None:
    trained = training(tmp_path, optim=optim)
    trained.train()
    fresh = training(tmp_path / "fresh", optim=optim)
    assert resume_problem(Path(checkpoint_of(trained, 6)), fresh) is None
    fresh.train(checkpoint_of(trained, 6))
    assert weights(fresh) == weights(trained)
    said = resume_problem(Path(checkpoint_of(whole, 6)), training(tmp_path / "other", optim=optim))
    assert (said is None) == (optim == "adamw_torch_fused")


def test_auto_resumes_with_the_optimizer_of_the_checkpoint_where_another_was_installed_since(
    whole: Any, tmp_path: Path
) -> None:
    spec = load_spec(Path("specs/latex.yaml").read_text(), "spec", environ={}).spec.train
    store = CheckpointStore(uri=str(tmp_path), fingerprint="f")

    def chosen(found: str = "adamw_8bit", **train: Any) -> str:
        return optimizer_to_resume(replace(spec, **{"optim": "auto", **train}), store, found)

    assert chosen() == "adamw_8bit"
    store.save(Path(checkpoint_of(whole, 6)), 6)
    assert chosen() == chosen(resume_from_checkpoint=store.at(6)) == "adamw_torch_fused"
    assert chosen(optim="adamw_8bit") == chosen(resume_from_checkpoint="never") == "adamw_8bit"
    assert chosen("adamw_torch") == "adamw_torch"
    state = tmp_path / "step-6" / "optimizer.json"
    stored = state.read_text()
    assert '"AdamW"' in stored
    for other in (stored.replace('"AdamW"', '"AdamW8bit"'), "no JSON", "[]"):
        state.write_text(other)
        assert chosen() == "adamw_8bit"


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}])
def test_an_adapter_s_weights_are_found_by_their_names_in_memory(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    adapter = LoraConfig(r=2, target_modules=["first", "second"], **more)
    model: Any = get_peft_model(Net(), adapter)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    trainer: Any = SimpleNamespace(model=model)
    found = SafetensorsTrainer.trained_state_of(trainer, tmp_path)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert found.keys() == trained.keys()
    for name, weight in trained.items():
        assert torch.equal(found[name], weight), name

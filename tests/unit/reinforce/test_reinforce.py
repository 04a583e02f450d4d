"""The reinforce stage on the tiny model: what it samples, learns, stores and resumes."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.trainer_utils import align_special_tokens
from trl import GRPOConfig

from job import engines, families, signals
from job.engines.device import resolve_optim
from job.engines.stored_adapter import read_adapter
from job.errors import SpecError, Stopped
from job.evaluation.generate import generate_all
from job.evaluation.prompts import questions
from job.evaluation.sampling import AtOnce, Sampling, draw, never_sampled, sample_answers
from job.families.batches import model_inputs
from job.families.encoded import Encoded
from job.families.token_scores import token_scores
from job.prep.rows import Message, Part, Row
from job.reinforce import trainer
from job.reinforce.answer_scores import answered
from job.reinforce.progress import history_of, read_history
from job.reinforce.prompts import Prompts, RolloutOrder
from job.reinforce.result import ReinforceResult
from job.reinforce.settings import as_training
from job.reinforce.special_tokens import padded, special_tokens_kept
from job.rewards.reward import Scored
from job.train import adapting
from tests import models
from tests.unit.reinforce.stage import CPU, by_length, spec_of

ANSWERS = ((305, 309, 307), (311, 303))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# --- answers and their probabilities --------------------------------------------------------


def test_the_likeliest_token_alone_is_what_greedy_decoding_gives(
    rows: list[Row], family: families.Family
) -> None:
    spec = spec_of()
    model = engines.create(spec.model, spec.lora, CPU).load(family)
    family.use_packed_step(model)
    asked = questions(rows, "last")
    prompts = [family.encode_prompt(each.id, each.asked, each.images) for each in asked]
    likeliest = Sampling(max_new_tokens=6, temperature=1.0, top_p=1e-9)
    sampled = sample_answers(model, family, prompts, likeliest)
    generation = replace(spec.eval.generation, max_new_tokens=6)
    greedy = generate_all(model, family, asked, generation, batch_size=4)
    assert [
        [token for token in answer if token not in family.end_tokens] for answer in sampled
    ] == greedy
    assert all(answer[-1] in family.end_tokens for answer in sampled if len(answer) < 6), (
        "an answer that is not cut has its end token"
    )


@pytest.fixture(scope="module")
def llama(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[families.Family, PreTrainedModel, list[Encoded]]:
    """A tiny Llama whose checkpoint penalizes repetition, and prompts for it."""
    directory = tmp_path_factory.mktemp("llama")
    models.llama(directory)
    settings = {"repetition_penalty": 5.0, "min_new_tokens": 6, "eos_token_id": 1}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    spec = spec_of(f"model.model_name_or_path={directory}")
    bound = families.bind(
        families.read_checkpoint(str(directory), directory), spec.model, spec.data
    )
    model = engines.create(spec.model, spec.lora, CPU).load(bound)
    asked = [Message(role="user", parts=(Part(text=text),)) for text in ("One?", "And two?")]
    return bound, model, [bound.encode_prompt("row", (each,), ()) for each in asked]


def test_settings_of_generation_in_the_checkpoint_do_not_bend_what_is_sampled(
    llama: tuple[families.Family, PreTrainedModel, list[Encoded]],
) -> None:
    family, model, prompts = llama
    own = model.generation_config
    assert own.repetition_penalty == 5
    likeliest = Sampling(max_new_tokens=6, temperature=1.0, top_p=1e-9)
    never = never_sampled(family, model.get_output_embeddings().weight.shape[0])
    for prompt, answer in zip(
        prompts, sample_answers(model, family, prompts, likeliest), strict=True
    ):
        for count, token in enumerate(answer):
            tokens = torch.tensor([[*prompt.input_ids, *answer[:count]]])
            logits = model(tokens).logits[0, -1].index_fill(0, torch.tensor(never), -torch.inf)
            assert token == logits.argmax()
    assert model.generation_config is own


def test_answers_that_did_not_fit_at_once_are_not_tried_again(
    llama: tuple[families.Family, PreTrainedModel, list[Encoded]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, model, prompts = llama
    generate, tried = model.generate, []

    def little_memory(input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        tried.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found: torch.Tensor = generate(input_ids=input_ids, **more)
        return found

    monkeypatch.setattr(model, "generate", little_memory)
    at_once, one_token = AtOnce(rows=2), Sampling(max_new_tokens=1, temperature=1.0, top_p=1.0)
    for _ in range(2):
        sample_answers(model, family, prompts, one_token, at_once=at_once)
    assert tried == [2, 1, 1, 1, 1]


def test_special_tokens_that_the_trainer_sets_do_not_stay(
    llama: tuple[families.Family, PreTrainedModel, list[Encoded]],
) -> None:
    family, model, _ = llama
    tokenizer = family.processor.tokenizer
    before = tokenizer.pad_token, model.config.to_dict(), model.generation_config.to_dict()
    assert tokenizer.pad_token is None
    with special_tokens_kept(model):
        given = padded(tokenizer)
        given.pad_token = given.eos_token
        align_special_tokens(model, given)
        assert model.config.pad_token_id == 1
    after = tokenizer.pad_token, model.config.to_dict(), model.generation_config.to_dict()
    assert before == after


def test_no_image_is_ever_sampled(rows: list[Row], family: families.Family) -> None:
    never = never_sampled(family, 1000)
    assert {token for token in range(1000) if family.is_image_token(token)} <= {*never}
    assert not {*family.end_tokens} & {*never}
    logits = torch.zeros(64, 1000)
    logits[:, never] = 100.0
    drawn = draw(
        logits, Sampling(max_new_tokens=1, temperature=1.0, top_p=1.0), torch.tensor(never)
    )
    assert not {*drawn.tolist()} & {*never}


def test_scores_are_the_log_probabilities_of_the_whole_distribution(
    rows: list[Row], family: families.Family
) -> None:
    spec = spec_of()
    model = engines.create(spec.model, spec.lora, CPU).load(family)
    encoded = []
    for row, answer in zip(rows[:2], ANSWERS, strict=True):
        [asked] = questions([row], "last")
        prompt = family.encode_prompt(asked.id, asked.asked, asked.images)
        encoded.append(answered(prompt, answer))
    batch = model_inputs(dict(family.collate(encoded)))
    scores, entropies = token_scores(model, model, batch, temperature=2.0)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    full = torch.log_softmax(model(**inputs).logits.float() / 2.0, dim=-1)
    expected = [
        full[number, len(each.input_ids) - len(answer) + i - 1, token]
        for number, (each, answer) in enumerate(zip(encoded, ANSWERS, strict=True))
        for i, token in enumerate(answer)
    ]
    torch.testing.assert_close(scores, torch.stack(expected))
    assert (entropies > 0).all()


# --- the order of rows ----------------------------------------------------------------------


def test_every_row_is_answered_before_any_is_again_and_a_longer_stage_begins_alike(
    rows: list[Row], family: families.Family
) -> None:
    own = spec_of("reinforce.max_steps=4").reinforce
    assert own is not None
    prompts = Prompts(family=family, rows=rows, max_length=256)
    order = RolloutOrder.of(own, prompts, seed=1)
    assert sorted(row for group in order.groups[:2] for row in group) == [0, 1, 2, 3]
    assert sorted(row for group in order.groups[2:] for row in group) == [0, 1, 2, 3]
    assert len(list(order)) == len(order) == 8
    longer = RolloutOrder.of(replace(own, max_steps=9), prompts, seed=1)
    assert longer.groups[:4] == order.groups
    assert next(iter(order)) == [row for row in order.groups[0] for _ in range(2)]


# --- what is refused before anything is trained ------------------------------------------------


def test_an_adapter_on_the_output_layer_is_refused_by_the_architecture_alone(
    tmp_path: Path,
) -> None:
    models.llama(tmp_path)
    spec = spec_of("lora.target_modules=[q_proj, lm_head]", f"model.model_name_or_path={tmp_path}")
    with pytest.raises(SpecError, match="adapts the output layer, lm_head") as refused:
        adapting.require(spec)
    assert refused.value.problems[0].field == "$.lora.target_modules"
    adapting.require(replace(spec, reinforce=None))


def test_an_optimizer_that_the_device_lacks_is_named_as_the_stages_own() -> None:
    spec = spec_of("reinforce.optim=adamw_8bit")
    with pytest.raises(SpecError, match="8-bit optimizers need a GPU") as refused:
        resolve_optim(as_training(spec, on_gpu=False).train, CPU, section="reinforce")
    assert refused.value.problems[0].field == "$.reinforce.optim"


# --- the stage ------------------------------------------------------------------------------


def test_a_stage_resumed_between_steps_on_the_same_answers_is_bit_equal(
    run: Callable[..., tuple[ReinforceResult, Path]], tmp_path: Path
) -> None:
    settings = ("reinforce.max_steps=3", "reinforce.num_iterations=2", "reinforce.beta=0.1")
    spec = spec_of(
        *settings, "reinforce.lr_scheduler_type=constant", "reinforce.learning_rate=1e-2"
    )
    result, undisturbed = run("undisturbed", spec)
    assert result.learned
    assert result.kl is not None
    assert result.last_reward == read_history(undisturbed)[-1]["reward"]
    own = spec.reinforce
    assert own is not None
    # A checkpoint in the middle of a rollout: the second step learns from the first's answers.
    run("short", replace(spec, reinforce=replace(own, max_steps=1)))
    (tmp_path / "resumed").mkdir()
    (tmp_path / "short" / "checkpoints").rename(tmp_path / "resumed" / "checkpoints")
    again, resumed = run("resumed", spec)
    assert again.resumed_from_step == 1
    assert differences(weights(undisturbed), weights(resumed)) == []
    for file in ("optimizer.safetensors", "rng_state.safetensors", "trainer_state.json"):
        first, second = (
            tmp_path / name / "checkpoints" / "step-3" / file for name in ("undisturbed", "resumed")
        )
        assert first.read_bytes() == second.read_bytes(), file
    assert read_history(undisturbed) == read_history(resumed)


def test_equal_rewards_change_nothing_and_are_told(
    run: Callable[..., tuple[ReinforceResult, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def right(answers: Sequence[Scored]) -> list[float]:
        return [1.0 for _ in answers]

    result, folder = run("equal", spec_of("reinforce.max_steps=2"), right)
    assert not result.learned
    assert result.equal_groups == 1
    assert result.last_reward == 1
    assert (
        "nothing was learned: all answers to a row had the same reward" in capsys.readouterr().err
    )
    assert all(not tensor.any() for name, tensor in weights(folder).items() if ".lora_B" in name), (
        "an adapter starts with B = 0"
    )


def test_rewards_rise_and_the_samples_say_for_what(
    run: Callable[..., tuple[ReinforceResult, Path]],
) -> None:
    spec = spec_of(
        "reinforce.max_steps=6",
        "reinforce.num_generations=8",
        "reinforce.per_device_train_batch_size=16",
        "reinforce.gradient_accumulation_steps=1",
        "reinforce.learning_rate=1e-2",
        "reinforce.save_steps=6",
    )
    result, folder = run("rise", spec)
    assert result.first_reward is not None
    assert result.last_reward is not None
    assert result.last_reward > result.first_reward + 0.1
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {each["step"] for each in samples} == set(range(1, 7))
    for each in samples:
        [value] = by_length([Scored(answer=each["answer"], reference="", prompt=None, row=0)])
        assert each["reward"] == each["rewards"]["test"] == value


def test_a_stage_that_diverges_in_its_last_step_ends_and_stores_nothing(
    run: Callable[..., tuple[ReinforceResult, Path]], tmp_path: Path
) -> None:
    def break_the_weights(answers: Sequence[Scored]) -> list[float]:
        return [3e38 * number for number in range(len(answers))]

    spec = spec_of(
        "reinforce.max_steps=1",
        "reinforce.scale_rewards=none",
        "reinforce.max_grad_norm=0",
        "reinforce.lr_scheduler_type=constant",
    )
    with pytest.raises(SpecError, match="no longer finite after step 1") as caught:
        run("diverged", spec, break_the_weights)
    assert str(caught.value).startswith("$.reinforce.learning_rate: ")
    [problem] = caught.value.problems
    assert problem.fix == "lower it", "a constant rate has no warm-up"
    assert not [*tmp_path.glob("diverged/checkpoints/*")]


def test_a_reward_that_falls_is_told(
    run: Callable[..., tuple[ReinforceResult, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def less_each_time(answers: Sequence[Scored]) -> list[float]:
        calls.append(1)
        return [(1 - number / len(answers)) / 3 ** len(calls) for number in range(len(answers))]

    result, _ = run("falls", spec_of("reinforce.max_steps=2"), less_each_time)
    assert result.reward_fell
    assert "the reward fell to less than half" in capsys.readouterr().err


def test_a_stage_of_which_nothing_is_left_still_has_samples(
    run: Callable[..., tuple[ReinforceResult, Path]],
) -> None:
    spec = spec_of("reinforce.max_steps=3")
    _, undisturbed = run("undisturbed", spec)
    result, resumed = run("again", spec, store="undisturbed")
    assert result.resumed_from_step == 3
    every, left = ((each / "samples.jsonl").read_text() for each in (undisturbed, resumed))
    kept = [line for line in every.splitlines() if json.loads(line)["step"] != 2]
    assert kept
    assert left.splitlines() == kept


def test_sigterm_leaves_a_checkpoint_of_the_step(
    run: Callable[..., tuple[ReinforceResult, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(answers: Sequence[Scored]) -> list[float]:
        monkeypatch.setattr(signals, "received", lambda: "SIGTERM")
        return by_length(answers)

    with pytest.raises(Stopped, match="stopped after step 1 of 2 of reinforce"):
        run("stopped", spec_of("reinforce.max_steps=2"), stop)
    assert (tmp_path / "stopped" / "checkpoints" / "step-1" / "manifest.json").exists()


def test_a_signal_within_a_rollout_stores_the_state_before_it(
    run: Callable[..., tuple[ReinforceResult, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(
        "reinforce.max_steps=2", "reinforce.save_steps=9", "reinforce.learning_rate=1e-2"
    )
    _, undisturbed = run("undisturbed", spec)
    rollouts: list[list[list[int]]] = []

    def stopped_in_the_second(*args: Any, **more: Any) -> list[list[int]]:
        if rollouts:
            monkeypatch.setattr(signals, "received", lambda: "SIGTERM")
        rollouts.append(sample_answers(*args, **more))
        return rollouts[-1]

    monkeypatch.setattr(trainer, "sample_answers", stopped_in_the_second)
    with pytest.raises(Stopped, match=r"after step 1 of 2 .* checkpoint of step 1 is stored"):
        run("stopped", spec)
    assert not any(rollouts[1]), "sampling ends at once"
    monkeypatch.undo()
    again, resumed = run("resumed", spec, store="stopped")
    assert again.resumed_from_step == 1
    assert differences(weights(undisturbed), weights(resumed)) == []
    assert read_history(undisturbed) == read_history(resumed)
    samples = [(each / "samples.jsonl").read_text() for each in (undisturbed, resumed)]
    assert samples[0] == samples[1], "of the first step, and of those since the resume"


def test_the_divergence_is_from_the_adapter_at_the_start(
    run: Callable[..., tuple[ReinforceResult, Path]],
) -> None:
    spec = spec_of("reinforce.max_steps=1", "reinforce.learning_rate=1e-1")
    _, before = run("before", spec)
    start = read_adapter("before", before / "adapter", families.architecture(spec.model)[1])
    settings = ("reinforce.max_steps=2", "reinforce.beta=0.1", "reinforce.learning_rate=1e-2")
    _, folder = run("after", spec_of(*settings), start=start)
    first, second = (step["kl"] for step in read_history(folder))
    assert first == pytest.approx(0, abs=1e-7)
    assert second > 1e-5


def test_rollouts_do_not_make_frozen_inputs_require_gradients(
    run: Callable[..., tuple[ReinforceResult, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = []
    compute_loss = trainer.ReinforceTrainer.compute_loss

    def counting(
        self: trainer.ReinforceTrainer, model: torch.nn.Module, *args: Any, **more: Any
    ) -> Any:
        assert self.model.is_gradient_checkpointing
        found = [hook for each in model.modules() for hook in each._forward_hooks.values()]
        hooks.append(sum("require_grads" in getattr(hook, "__name__", "") for hook in found))
        return compute_loss(self, model, *args, **more)

    monkeypatch.setattr(trainer.ReinforceTrainer, "compute_loss", counting)
    run("hooks", spec_of("reinforce.max_steps=2", "train.gradient_checkpointing=true"))
    assert hooks == [0, 0, 0, 0]


def test_the_page_names_every_default_that_is_not_trls() -> None:
    schema = json.loads(Path("job/spec/schema/job.v1.json").read_text())
    theirs = {field.name: field.default for field in fields(GRPOConfig)}
    differing = {
        key
        for key, entry in schema["$defs"]["reinforce"]["properties"].items()
        if key in theirs and entry["default"] != theirs[key]
    }
    page = Path("docs/26-reinforcement.md").read_text()
    [exceptions] = re.findall(r"Defaults are TRL's too, except: (.*?)\n-", page, re.DOTALL)
    assert {*re.findall(r"`([a-z_]+)`", exceptions)} == differing


def test_a_resumed_stage_keeps_the_best_of_the_checkpoints_that_are_still_stored(
    run: Callable[..., tuple[ReinforceResult, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = spec_of(
        "data.validation_fraction=0.1",
        "reinforce.max_steps=2",
        "reinforce.lr_scheduler_type=constant",
        "reinforce.eval_strategy=steps",
        "reinforce.eval_steps=1",
        "reinforce.metric_for_best_model=eval_loss",
        "reinforce.load_best_model_at_end=true",
    )

    def equal(answers: Sequence[Scored]) -> list[float]:
        """Changes nothing: of equal validations the first is the best."""
        return [0.0 for _ in answers]

    run("first", spec, equal)
    history = read_history(tmp_path / "first" / "reinforced")
    losses = {step["step"]: step["eval_loss"] for step in history if "eval_loss" in step}
    assert losses[1] == losses[2]
    shutil.rmtree(tmp_path / "first" / "checkpoints" / "step-1")
    own = spec.reinforce
    assert own is not None
    longer = replace(spec, reinforce=replace(own, max_steps=3))
    result, _ = run("again", longer, equal, store="first")
    assert result.resumed_from_step == 2
    assert "the checkpoint of the best validation is not stored" in capsys.readouterr().err


def test_the_history_of_a_resumed_stage_names_what_is_measured_in_the_same_order() -> None:
    measured = {"eval_loss": 1.0, "eval_exact_match": 0.5, "step": 2}
    stored = dict(sorted(measured.items()))  # as a checkpoint has it
    assert [*stored] != [*measured]
    [first], [again] = history_of([measured]), history_of([stored])
    assert [*first.items()] == [*again.items()]

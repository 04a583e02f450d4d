"""The reinforce stage on the tiny model: what it samples, learns, stores and resumes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from job import engines, families, signals
from job.engines.device import Accelerator, resolve_optim
from job.errors import SpecError, Stopped
from job.evaluation.generate import generate_all
from job.evaluation.prompts import questions
from job.evaluation.sampling import Sampling, draw, never_sampled, sample_answers
from job.families.batches import model_inputs
from job.families.token_scores import token_scores
from job.prep import formulas
from job.prep.images import inspect
from job.prep.rows import Message, Part, Row
from job.reinforce.progress import read_history
from job.reinforce.prompts import Prompts, RolloutOrder
from job.reinforce.reinforce import reinforce
from job.reinforce.result import ReinforceResult
from job.reinforce.settings import as_training
from job.reinforce.trainer import _answered
from job.rewards.named import NamedReward
from job.rewards.reward import Scored
from job.spec.load import load_spec
from job.spec.types import JobSpec
from job.train import adapting
from job.train.checkpoint.storage import CheckpointStore
from job.train.trackers import TrackerFiles
from job.train.train_context import TrainContext
from tests import models

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**34)
ANSWERS = ((305, 309, 307), (311, 303))
SETTINGS = (
    "reinforce.num_generations=2",
    "reinforce.per_device_train_batch_size=2",
    "reinforce.gradient_accumulation_steps=2",
    "reinforce.max_completion_length=5",
    "reinforce.temperature=3",
    "reinforce.logging_steps=1",
    "reinforce.save_steps=1",
    "reinforce.eval_strategy=no",
    "reinforce.eval_steps=null",
    "reinforce.metric_for_best_model=null",
    "reinforce.load_best_model_at_end=false",
    "data.validation=null",
    "train.eval_strategy=no",
    "train.eval_steps=null",
    "train.load_best_model_at_end=false",
)


def spec_of(*overrides: str) -> JobSpec:
    text = Path("specs/latex-grpo.yaml").read_text()
    return load_spec(text, "specs/latex-grpo.yaml", [*SETTINGS, *overrides], {}).spec


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    made = spec_of().data.train[0].formulas
    drawn = [formulas.sample(made, number) for number in range(4)]
    return [
        Row(
            id=f"formulas:{number}",
            messages=(
                Message(role="user", parts=(Part(image=0), Part(text="Write it."))),
                Message(role="assistant", parts=(Part(text=each.latex),)),
            ),
            images=(inspect(each.png),),
        )
        for number, each in enumerate(drawn)
    ]


@pytest.fixture(scope="module")
def family() -> families.Family:
    spec = spec_of()
    return families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)


def by_length(answers: Sequence[Scored]) -> list[float]:
    """Differs between most answers."""
    return [min(1.0, len(each.answer) / 20) for each in answers]


@pytest.fixture
def run(
    tmp_path: Path, rows: list[Row], family: families.Family
) -> Callable[..., tuple[ReinforceResult, Path]]:
    def run_stage(
        name: str, spec: JobSpec, score: Any = by_length, store: str | None = None
    ) -> tuple[ReinforceResult, Path]:
        engine = engines.create(spec.model, spec.lora, CPU)
        directory = tmp_path / name
        context = TrainContext(
            spec=spec,
            engine=engine,
            accelerator=CPU,
            family=family,
            start=None,
            data=SimpleNamespace(rows=lambda split: rows),  # type: ignore[arg-type]
            directory=directory,
            scratch=directory / "scratch",
            checkpoints=CheckpointStore(
                uri=str(tmp_path / (store or name) / "checkpoints"), fingerprint="f"
            ),
            trackers=TrackerFiles((), directory / "logs", str(directory / "uploaded")),
            publish=lambda path: None,
            check_lease=lambda: None,
            report_step=lambda step: None,
            report_validation=lambda validation: None,
            answer_metrics=None,
        )
        reward = NamedReward(name="test", weight=1.0, score=score)
        _, result = reinforce(context, engine.load(family), (reward,))
        return result, directory / "reinforced"

    return run_stage


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
        encoded.append(_answered(prompt, answer))
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

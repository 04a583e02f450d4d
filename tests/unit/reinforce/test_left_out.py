"""What a pass leaves out: answers without an advantage, and repeated images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from job import engines, families
from job.evaluation.prompts import questions
from job.families.encoded import Encoded
from job.families.packed_shape import PackedShape
from job.families.token_scores import token_scores
from job.prep.rows import Row
from job.reinforce import trainer
from job.reinforce.advantages import affecting_gradient, equal_group_share, without_rounding_errors
from job.reinforce.answer_scores import Answers, AnswerScores, answered
from job.reinforce.progress import read_history
from job.reinforce.result import ReinforceResult
from job.rewards.reward import Scored
from tests.unit.reinforce.stage import CPU, by_length, spec_of

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo")
STEPS = (
    "reinforce.max_steps=2",
    "reinforce.num_iterations=2",  # the second step needs the log-probabilities of the rollout
    "reinforce.num_generations=2",
    "reinforce.per_device_train_batch_size=3",
    "reinforce.learning_rate=1e-2",
    "reinforce.lr_scheduler_type=constant",
    "lora.finetune_vision_layers=true",
)


def all_differ(answers: Sequence[Scored]) -> list[float]:
    return [0.1 * number for number in range(len(answers))]


def some_differ(answers: Sequence[Scored]) -> list[float]:
    """In one of three groups."""
    return [0.1 * number if number < 2 else 0.3 for number in range(len(answers))]


def none_differ(answers: Sequence[Scored]) -> list[float]:
    return [0.3 for _ in answers]


@pytest.mark.parametrize(
    ("rewards", "computed"), [(all_differ, 6), (some_differ, 2), (none_differ, 0)]
)
def test_the_loss_and_every_gradient_are_those_of_all_answers(
    run: Callable[..., tuple[ReinforceResult, Path]],
    monkeypatch: pytest.MonkeyPatch,
    rewards: Callable[[Sequence[Scored]], list[float]],
    computed: int,
) -> None:
    own = trainer.ReinforceTrainer.compute_loss
    of_some = AnswerScores.of_some
    passes: list[Pass] = []

    def everything(
        self: AnswerScores, answers: Answers, taught: torch.Tensor, sampled: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            left_out, _ = of_some(self, answers, taught, sampled)
        padded = replace(self, adapted=replace(self.adapted, padding_free=False))
        found, entropies = padded.of_all(answers, len(answers))
        entropy = entropies[taught][answers.present[taught].bool()].mean()
        passes.append(Pass(taught, left_out, found.detach(), entropy))
        return found, entropies

    def comparing(
        self: trainer.ReinforceTrainer, model: torch.nn.Module, inputs: Any, **more: Any
    ) -> torch.Tensor:
        loss, gradients = _gradients(model, own(self, model, inputs, **more))
        entropy = torch.tensor(self._metrics["train"]["entropy"][-1])
        with monkeypatch.context() as patch:
            patch.setattr(AnswerScores, "of_some", everything)
            expected_loss, expected = _gradients(model, own(self, model, inputs, **more))
        seen = passes[-1]
        assert_close(loss, expected_loss)
        assert_close(entropy, seen.entropy, equal_nan=True)
        assert {*gradients} == {*expected}
        assert any(".vision_tower." in name for name in expected)
        largest = max(float(each.abs().max()) for each in expected.values())
        assert (largest > 0) == bool(seen.taught.any())
        for name, each in expected.items():
            assert float((gradients[name] - each).abs().max()) <= 1e-5 * largest, name
        with monkeypatch.context() as patch:
            for self.loss_type in LOSSES:
                # By the log-probabilities, whose own gradients do not depend on the loss.
                found = []
                for scores in (seen.left_out, seen.everything):
                    leaf = scores.clone().requires_grad_()
                    given = leaf, torch.zeros_like(leaf)
                    patch.setattr(AnswerScores, "of_some", lambda *_, given=given: given)
                    value = own(self, model, inputs, **more)
                    found.append((value.detach(), *torch.autograd.grad(value, leaf)))
                (loss, gradient), (expected_loss, expected_gradient) = found
                assert_close(loss, expected_loss)
                assert_close(gradient, expected_gradient)
                assert not expected_gradient[~seen.taught].any()
        self.loss_type = LOSSES[0]
        return own(self, model, inputs, **more)

    monkeypatch.setattr(trainer.ReinforceTrainer, "compute_loss", comparing)
    result, folder = run("compared", spec_of(*STEPS), rewards)
    per_step = [sum(int(each.taught.sum()) for each in passes[i : i + 2]) for i in (0, 2)]
    assert per_step == [computed, computed]
    assert result.learned == (computed > 0)
    assert read_history(folder)[0]["equal_groups"] == pytest.approx(1 - computed / 6)


@dataclass(frozen=True)
class Pass:
    taught: torch.Tensor
    left_out: torch.Tensor
    """The log-probabilities where those of other answers are left out, and all."""
    everything: torch.Tensor
    entropy: torch.Tensor
    """Of the answers that teach."""


def _gradients(
    model: torch.nn.Module, loss: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(loss, [*trained.values()], allow_unused=True)
    named = zip(trained, found, strict=True)
    return loss.detach(), {name: each for name, each in named if each is not None}


def test_a_step_that_teaches_nothing_keeps_its_momentum(
    run: Callable[..., tuple[ReinforceResult, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer steps on zero gradients, as it did when every answer was computed."""
    rollouts = 0

    def first_only(answers: Sequence[Scored]) -> list[float]:
        nonlocal rollouts
        rollouts += 1
        return by_length(answers) if rollouts == 1 else [0.3 for _ in answers]

    settings = ("reinforce.max_steps=2", "reinforce.learning_rate=1e-2")
    _, folder = run("left-out", spec_of(*settings), first_only)
    steps = read_history(folder)
    assert steps[0]["grad_norm"] > 0
    assert steps[1]["grad_norm"] == steps[1]["loss"] == 0
    assert "entropy" in steps[0]
    assert "entropy" not in steps[1]
    rollouts = 0
    monkeypatch.setattr(
        trainer,
        "affecting_gradient",
        lambda inputs, beta: torch.ones_like(inputs["advantages"]).bool(),
    )
    _, everything = run("everything", spec_of(*settings), first_only)
    for one, other in zip(_adapter(folder), _adapter(everything), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def _adapter(folder: Path) -> list[torch.Tensor]:
    return [*load_file(folder / "adapter" / "adapter_model.safetensors").values()]


def test_equal_rewards_have_no_advantage_whatever_their_mean_was_rounded_to() -> None:
    rounded = torch.tensor([3e-4, 3e-4, 3e-4, 1.0, 0.0, -1.0])
    advantages = without_rounding_errors(rounded, 3)
    assert advantages.tolist() == [0, 0, 0, 1, 0, -1]
    assert equal_group_share(advantages, 3) == 0.5


def test_an_answer_teaches_by_its_advantage_or_by_its_divergence() -> None:
    inputs = {
        "advantages": torch.tensor([0.5, 0.0, -0.5]),
        "completion_mask": torch.tensor([[1, 0], [1, 1], [0, 0]]),  # the last one is masked
    }
    assert affecting_gradient(inputs, 0.0).tolist() == [True, False, False]
    assert affecting_gradient(inputs, 0.1).tolist() == [True, True, False]


def test_each_image_is_computed_once(rows: list[Row], family: families.Family) -> None:
    spec = spec_of()
    model = engines.create(spec.model, spec.lora, CPU).load(family)
    asked = questions(rows, "last")
    first, second = (family.encode_prompt(e.id, e.asked, e.images) for e in asked[:2])
    prompts: list[Encoded] = [second, first, second, first]
    encoded = [answered(prompt, [100 + n, 101]) for n, prompt in enumerate(prompts)]
    family.use_packed_step(model)
    seen: list[int] = []
    model.model.vision_tower.blocks[0].register_forward_pre_hook(
        lambda module, given: seen.append(len(given[0]))
    )
    packed, shared = (family.pack(encoded, images_once=once) for once in (False, True))
    expected, found = (token_scores(model, model, batch, 1.0)[0] for batch in (packed, shared))
    patches = sum(PackedShape.of([family.row_size(each)]).patches for each in encoded)
    assert seen == [patches, patches // 2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

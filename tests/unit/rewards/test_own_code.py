"""Rewards by a user's own function: how it is found, called and checked."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.errors import InputError, JobError, SpecError
from job.rewards.named import NamedReward, rewards_of
from job.rewards.reward import Scored
from job.spec.types import RewardSpec

FIELD = "$.reinforce.rewards[0].name"
ANSWERS = [
    Scored(answer="a", reference="abc", prompt="What?", row=4),
    Scored(answer="abc", reference="abc", prompt="What?", row=4),
]
Own = Callable[..., NamedReward]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Own]:
    """Writes a module to a folder of the path, and takes a function of it as a reward."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(source: str, name: str = "own_rewards:reward") -> NamedReward:
        (tmp_path / "own_rewards.py").write_text(source, encoding="utf-8")
        [found] = rewards_of([RewardSpec(name=name, weight=0.5)], allow_code=True)
        return found

    yield load
    sys.modules.pop("own_rewards", None)


def test_a_function_as_trl_has_them_is_a_reward(own: Own) -> None:
    found = own(
        "def reward(completions, references, **kwargs):\n"
        "    assert kwargs == {'prompts': ['What?', 'What?'], 'rows': [4, 4]}\n"
        "    return [len(c) / len(r) for c, r in zip(completions, references)]\n"
    )
    assert (found.name, found.weight) == ("own_rewards:reward", 0.5)
    assert found.score(ANSWERS) == [1 / 3, 1.0]


def test_a_function_gets_the_keywords_that_it_names_and_may_return_arrays(own: Own) -> None:
    found = own(
        "import numpy as np\n"
        "def reward(completions, scale=2):\n"
        "    return np.array([c == 'abc' for c in completions]) / scale\n"
    )
    assert found.score(ANSWERS) == [0.0, 0.5]


def test_the_digest_is_that_of_the_functions_file(own: Own) -> None:
    one = own("def reward(completions): return [0] * len(completions)\n").digest
    sys.modules.pop("own_rewards")
    assert one is not None
    assert one != own("def reward(completions): return [1.0] * len(completions)\n").digest


@pytest.mark.parametrize(
    ("source", "name", "kind", "message", "fix"),
    [
        ("", "no_such_module:f", InputError, "no module no_such_module can be", "PYTHONPATH"),
        ("", "own_rewards.more:f", InputError, "no module own_rewards.more can be", "PYTHONPATH"),
        ("import no_such_package", "own_rewards:f", InputError, "imports no_such_package",
         "install no_such_package"),
        ("def reward(completions): return []", "own_rewards:rewards", SpecError,
         "has no function rewards in the module own_rewards; its functions are reward",
         "write own_rewards:reward"),
        ("", "own_rewards:reward", SpecError, "has no function reward", "define it"),
        ("reward = 3", "own_rewards:reward", SpecError,
         "is not a function: reward in the module own_rewards has the type int", "name a function"),
        ("nine = 9\ndef none(completions): return []", "own_rewards:nine", SpecError,
         "has the type int; its functions are none", "name one of its functions"),
        ("def reward(:", "own_rewards:reward", SpecError, "cannot be imported: SyntaxError",
         "correct the code"),
        ("1 / 0", "own_rewards:reward", SpecError,
         "cannot be imported: ZeroDivisionError: division by zero, at own_rewards.py:1", "correct"),
        ("import sys\nsys.exit(0)", "own_rewards:reward", SpecError, "SystemExit", "correct"),
        ("def reward(completions, solution): return []", "own_rewards:reward", SpecError,
         "needs the argument solution", "completions, prompts, references, rows"),
        ("def reward(): return []", "own_rewards:reward", SpecError, "takes no argument",
         "completions"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_used_is_refused_before_anything_is_trained(
    own: Own, source: str, name: str, kind: type[JobError], message: str, fix: str
) -> None:
    with pytest.raises(kind) as caught:
        own(source, name)
    [problem] = caught.value.problems
    assert caught.value.exit_code == (12 if kind is InputError else 10)
    assert (problem.field, problem.value) == (FIELD, name)
    assert problem.key == "reinforce.rewards.name"
    assert message in problem.message
    assert fix in str(problem.fix)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", "returned 1 values for 2 completions"),
        ("[1.0, 0.0, 0.0]", "returned 3 values for 2 completions"),
        ("1.0", "returned float instead of a list"),
        ("None", "returned NoneType instead of a list"),
        ("'ab'", "returned str instead of a list"),
        ("[0.5, float('nan')]", "returned nan for completion 1"),
        ("[float('inf'), 0]", "returned inf for completion 0"),
        ("[0, 1.5]", "returned 1.5 for completion 1"),
        ("[-0.1, 1]", "returned -0.1 for completion 0"),
        ("[0, None]", "returned None for completion 1"),
        ("['high', 0]", "returned 'high' for completion 0"),
        ("[0, '0.5']", "returned '0.5' for completion 1"),
        ("[b'1', 0]", "returned b'1' for completion 0"),
        ("(_ for _ in ()).throw(MemoryError)", "raised MemoryError, at own_rewards.py:1"),
        ("completions[5]", "raised IndexError: list index out of range, at own_rewards.py:1"),
        ("exit(3)", "raised SystemExit: 3"),
    ],
)
def test_what_is_no_reward_ends_the_run_with_its_reason(
    own: Own, returned: str, message: str
) -> None:
    found = own(f"def reward(completions): return {returned}\n")
    with pytest.raises(SpecError) as caught:
        found.score(ANSWERS)
    [problem] = caught.value.problems
    assert caught.value.exit_code == 10
    assert problem.field == FIELD
    assert problem.value == "own_rewards:reward"
    assert message in problem.message
    assert problem.fix

"""The reinforce stage of `specs/latex-grpo.yaml` on the tiny model, made short."""

from collections.abc import Sequence
from pathlib import Path

from job import families
from job.engines.device import Accelerator
from job.rewards.reward import Scored
from job.spec.load import load_spec
from job.spec.types import JobSpec

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**34)
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


def by_length(answers: Sequence[Scored]) -> list[float]:
    """Differs between most answers."""
    return [min(1.0, len(each.answer) / 20) for each in answers]

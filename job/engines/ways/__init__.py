"""Ways to compute a step, chosen by trying each on the device before the first step.

`trials` holds the trials, `child` runs them in a process of their own, and `kept` remembers what
they found for a device and the installed versions.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job import log
from job.engines.base import Engine
from job.engines.device import Accelerator
from job.engines.ways import kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from job.families.outcome import Outcome

GROUPED, ATTENTION = "grouped products", "attention by boundaries"
CAPTURED, COMPILED = "captured passes", "compiled blocks"
EIGHT_BIT, FOUR_BIT = "8-bit optimizer", "4-bit weights"
GENERATING = (GROUPED, ATTENTION)
"""What a command that only generates computes with."""
TRAINING = (*GENERATING, CAPTURED, COMPILED, EIGHT_BIT, FOUR_BIT)

Run = Callable[[Sequence[str]], "list[Outcome]"]
"""Runs the trials of these names."""


@dataclass(frozen=True)
class Ways:
    """What the trials found, in their order."""

    outcomes: "tuple[Outcome, ...]" = ()

    def obstacle(self, way: str) -> str | None:
        """Why the way was left; None if it was taken, or not tried."""
        outcome = next((each for each in self.outcomes if each.way == way), None)
        return None if outcome is None or outcome.taken else outcome.reason

    def of(self, name: str) -> "list[Outcome]":
        """The outcomes of a trial, which may try several ways: `name: way`."""
        return [each for each in self.outcomes if each.way.partition(":")[0] == name]


def find(
    accelerator: Accelerator,
    cache: Path | None,
    names: Sequence[str] = TRAINING,
    run: Run | None = None,
    *,
    anew: bool = False,
) -> Ways:
    """Tries the ways, or recalls what an earlier start with this device and versions found.

    Says a line for each, and makes the model families use what was found. A trial that fails, or
    ends its process, leaves its way and raises nothing. On a CPU nothing is slow to try, nothing
    kept, and no process started. `anew` tries all again, and keeps what is found. `cache` is None
    to keep nothing. `run` is for tests.
    """
    from job.engines.ways import child, trials

    if accelerator.kind == "cpu":
        found = trials.run(names, accelerator.device)
        for outcome in found:
            log.debug(outcome.way, **{_verb(outcome): outcome.reason})
        return Ways(tuple(found))
    run = run or functools.partial(child.run, device=accelerator.device)
    key = kept.key(accelerator)
    with kept.one_at_a_time(cache, key):
        recalled = {} if cache is None or anew else kept.read(cache, key)
        missing = [name for name in names if name not in recalled]
        tried = _by_trial(missing, run(missing) if missing else ())
        lasting = {n: each for n, each in tried.items() if not any(o.passing for o in each)}
        if cache is not None and lasting:
            kept.write(cache, key, recalled | lasting)
    every = recalled | tried
    for name in names:
        for outcome in every.get(name, ()):
            known = {"known": "from an earlier start"} if name in recalled else {}
            log.info(outcome.way, **{_verb(outcome): outcome.reason}, **known)
    ways = Ways(tuple(outcome for name in names for outcome in every.get(name, ())))
    adopt(ways)
    return ways


def adopt(ways: Ways) -> None:
    """Makes the model families use what the trials found, without trials of their own."""
    import torch

    from job.families.ernie45_vl.packed import varlen_trial
    from job.families.grouped_products import choice

    for outcome in ways.of(ATTENTION):
        varlen_trial.use(outcome.taken)
    for dtype in (torch.bfloat16, torch.float32):
        prefix = f"{GROUPED}: {str(dtype)[6:]}, "
        tried = [
            kept.renamed(each, each.way.removeprefix(prefix))
            for each in ways.of(GROUPED)
            if each.way.startswith(prefix)
        ]
        if tried:
            choice.use(dtype, choice.decide(tried))


def computing(model: "PreTrainedModel", engine: Engine) -> dict[str, str]:
    """How the padding-free step of a model computes: its attention and its routed experts."""
    import torch

    from job.families.base import SORTED_EXPERTS
    from job.families.grouped_products.choice import choose

    half = engine.autocast or engine.dtype in (torch.bfloat16, torch.float16)
    bounded = half and getattr(model, "varlen", False)
    experts = getattr(model.config, "_experts_implementation", None)
    if experts == SORTED_EXPERTS:
        experts = f"{experts}: {choose(model.device, model.dtype).way}"
    return {
        "attention": "by boundaries" if bounded else "in a padded grid",
        **({} if experts is None else {"routed experts": experts}),
    }


def _by_trial(names: Sequence[str], found: "Sequence[Outcome]") -> "dict[str, list[Outcome]]":
    return {name: [o for o in found if o.way.partition(":")[0] == name] for name in names}


def _verb(outcome: "Outcome") -> str:
    return "taken" if outcome.taken else "left"

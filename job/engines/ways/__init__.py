"""Ways to compute a step, chosen by trying each on the device before the first step.

`trials` holds the trials, `child` runs them in processes of their own, and `kept` remembers what
they found for a device and the installed versions.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from job import log
from job.engines.base import Engine
from job.engines.device import Accelerator
from job.engines.ways import kept
from job.local import daemon_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from job.families.outcome import Outcome

GROUPED, ATTENTION = "grouped products", "attention by boundaries"
CAPTURED, COMPILED = "captured passes", "compiled blocks"
EIGHT_BIT, FOUR_BIT = "8-bit optimizer", "4-bit weights"
KERNELS, DTYPES = ("torch", "triton"), ("bfloat16", "float16", "float32")


def grouped(kernel: str, dtype: str) -> str:
    """The name of a grouped product's trial."""
    return f"{GROUPED}: {dtype}, {kernel}"


GENERATING = (*(grouped(kernel, dtype) for dtype in DTYPES for kernel in KERNELS), ATTENTION)
"""What a command that only generates computes with."""
TRAINING = (*GENERATING, CAPTURED, COMPILED, EIGHT_BIT, FOUR_BIT)

Run = Callable[[Sequence[str]], "list[Outcome]"]
"""Runs the trials of these names."""


@dataclass(frozen=True)
class Ways:
    """What the trials found, in their order."""

    outcomes: "tuple[Outcome, ...]" = ()

    def of(self, way: str) -> "Outcome | None":
        """The outcome of the way's trial; None if it was not tried."""
        found = (each for each in self.outcomes if each.way == way and not each.untried)
        return next(found, None)

    def obstacle(self, way: str) -> str | None:
        """Why the trial rejected the way; None if it took it, or none ran: its use will tell."""
        outcome = self.of(way)
        return None if outcome is None or outcome.taken else outcome.reason


def agreed(ranks: Sequence[Ways]) -> Ways:
    """What all ranks of a group compute with: a way that any of them left is left.

    The same on every rank, so that none waits in a collective that another does not call.
    """
    outcomes: dict[str, Outcome] = {}
    for ways in ranks:
        for outcome in ways.outcomes:
            known = outcomes.setdefault(outcome.way, outcome)
            if ways.obstacle(outcome.way) and (known.taken or known.untried):
                outcomes[outcome.way] = outcome
    return Ways(tuple(outcomes.values()))


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
    ends its process, leaves its way and raises nothing; if no trial can run at all, a warning says
    why, and the first use of a way tells whether it serves.

    On a CPU nothing is slow to try, nothing kept, and no process started. `anew` tries all again,
    and keeps what is found. `cache` is None to keep nothing. `run` is for tests.
    """
    return begin(accelerator, cache, names, run, anew=anew)()


def begin(
    accelerator: Accelerator,
    cache: Path | None,
    names: Sequence[str] = TRAINING,
    run: Run | None = None,
    *,
    anew: bool = False,
) -> Callable[[], Ways]:
    """Starts what `find` does beside other work; a call of the result waits for it and ends it."""
    from job.engines.ways import child, trials
    from job.families.outcome import left

    if accelerator.kind == "cpu":
        return lambda: _on_cpu(trials.run(names, accelerator.device))
    run = run or functools.partial(child.run, device=accelerator.device)
    key = kept.key(accelerator)
    # It imports nothing: the job's own imports go on at the same time.
    work = functools.partial(_recalled_and_tried, key, cache, names, run, anew=anew)
    found = daemon_threads.start(work, name="ways")

    def end() -> Ways:
        if not found.done():
            log.info("the first model waits for the trials of ways to compute")
        waited = time.monotonic()
        if (error := found.exception()) is not None:  # a trial never ends the job
            reason = f"the trials failed: {type(error).__name__}: {error}"
            log.warn("ways to compute are not tried beforehand", reason=reason)
            return Ways(tuple(left(name, reason, untried=True) for name in names))
        recalled, tried, seconds = found.result()
        every = recalled | tried
        for name in names:
            known = {"known": "from an earlier start"} if name in recalled else {}
            log.info(name, **{_verb(every[name]): every[name].reason}, **known)
        if tried:
            log.info(
                "ways to compute were tried",
                trials=len(tried),
                took=log.seconds(seconds),
                waited=log.seconds(time.monotonic() - waited),
            )
        ways = Ways(tuple(every[name] for name in names))
        adopt(ways)
        return ways

    return end


def _on_cpu(found: "list[Outcome]") -> Ways:
    for outcome in found:
        log.debug(outcome.way, **{_verb(outcome): outcome.reason})
    return Ways(tuple(found))


def _recalled_and_tried(
    key: Mapping[str, str], cache: Path | None, names: Sequence[str], run: Run, *, anew: bool
) -> "tuple[dict[str, Outcome], dict[str, Outcome], float]":
    """What an earlier start found; what trials of the others find now, which is kept; and the
    seconds that these took."""
    started = time.monotonic()
    with kept.one_at_a_time(cache, key):
        recalled = {} if cache is None or anew else kept.read(cache, key)
        missing = [name for name in names if name not in recalled]
        tried = {each.way: each for each in run(missing)} if missing else {}
        lasting = {name: each for name, each in tried.items() if not each.passing}
        if cache is not None and (lasting or anew):
            kept.write(cache, key, recalled | lasting)
    return recalled, tried, time.monotonic() - started


def adopt(ways: Ways) -> None:
    """Makes the model families use what the trials found, without trials of their own."""
    import torch

    from job.families.ernie45_vl.packed import varlen_trial
    from job.families.grouped_products import choice

    if (outcome := ways.of(ATTENTION)) is not None:
        varlen_trial.use(outcome.taken)
    for dtype in DTYPES:
        found = {kernel: ways.of(grouped(kernel, dtype)) for kernel in KERNELS}
        tried = [replace(each, way=kernel) for kernel, each in found.items() if each is not None]
        if len(tried) == len(KERNELS):
            choice.use(getattr(torch, dtype), choice.decide(tried))


def computing(model: "PreTrainedModel", engine: Engine) -> dict[str, str]:
    """How the padding-free step of a model computes: its attention and its routed experts."""
    import torch

    from job.families.base import SORTED_EXPERTS

    half = engine.autocast or engine.dtype in (torch.bfloat16, torch.float16)
    varlen = half and getattr(model, "varlen", False)
    experts = getattr(model.config, "_experts_implementation", None)
    if experts == SORTED_EXPERTS:
        from job.families.grouped_products.choice import choose

        experts = f"{experts}: {choose(model.device, model.dtype).way}"
    return {
        "attention": "by boundaries" if varlen else "in a padded grid",
        **({} if experts is None else {"routed experts": experts}),
    }


def _verb(outcome: "Outcome") -> str:
    return "taken" if outcome.taken else "left"

"""What the stages of a job have to do, and the rates at which a device does it.

A stage's time is a sum over rates: a quantity of the job times the seconds that one unit takes.
`RATES` has values to start from, for GPUs and CPUs. Measured jobs replace them
(`job.planning.cost_model`); those that the measurements cannot tell apart keep the proportions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from job.planning.sizes import GIB

STAGES = ("start", "prep", "baseline", "train", "eval", "export", "finish")
"""`start` is the time from the start of the process to the first stage; `finish` are the card, the
report and all that follows."""
MAX_SLOTS = 256
"""Answers generated at once, unless the spec or the number of rows says fewer."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The quantities of a job that its stages' times depend on."""

    parameters: int
    layers: int
    """Decoder layers."""
    base_bytes: int
    """The base's weights on disk."""
    merged_bytes: int
    """The merged weights; 0 if none are written."""
    trainable: int
    prep_rows: int
    """Rows of all splits."""
    train_rows: int
    validated_tokens: float
    """Tokens of the rows whose loss is measured during training, over all validations."""
    steps: int
    passes: int
    """Forward and backward passes of all steps, in each process."""
    tokens: float
    """Tokens of all steps, in each process."""
    compiled: bool
    """Whether training runs compiled blocks."""
    four_bit: bool
    """Whether the base is loaded in 4 bits."""
    answers: int
    """Answers to generate in each evaluation."""
    new_tokens: float
    """Mean length of an answer, at most."""
    slots: int
    """Answers generated at once."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The seconds that one unit takes, before any measurement."""

    gpu: float
    cpu: float


RATES: Mapping[str, Rate] = {
    "start": Rate(gpu=6, cpu=6),
    "start, GiB": Rate(gpu=0.2, cpu=2),
    "prep": Rate(gpu=1, cpu=1),
    "prep, 1,000 rows": Rate(gpu=1, cpu=5),
    "load": Rate(gpu=4, cpu=1),
    "load, GiB": Rate(gpu=0.2, cpu=1),
    "evaluation": Rate(gpu=2, cpu=2),
    "evaluation, 1,000 decoding steps of a layer": Rate(gpu=0.35, cpu=2),
    "evaluation, million tokens of a layer": Rate(gpu=7, cpu=500),
    "evaluation, 100 answers": Rate(gpu=1, cpu=2),
    "training": Rate(gpu=10, cpu=3),
    "training, 1,000 rows": Rate(gpu=4, cpu=5),
    "training, 1,000 passes of a layer": Rate(gpu=2, cpu=10),
    "training, 1,000 million trained weights": Rate(gpu=0.1, cpu=5),
    "training, million tokens of a layer": Rate(gpu=1.5, cpu=90),
    "compiled training": Rate(gpu=40, cpu=60),
    "compiled training, 1,000 passes of a layer": Rate(gpu=1.5, cpu=10),
    "compiled training, million tokens of a layer": Rate(gpu=1.3, cpu=90),
    "validation, million tokens of a layer": Rate(gpu=0.5, cpu=30),
    "export": Rate(gpu=4, cpu=5),
    "export, GiB": Rate(gpu=1.2, cpu=20),
    "finish": Rate(gpu=4, cpu=4),
}


def stage_quantities(work: Work, ran: Sequence[str] = STAGES) -> dict[str, dict[str, float]]:
    """By stage of those in `ran`: the quantities of `RATES` that make up its time.

    The first stage that needs the model loads it.
    """
    found = {"start": _start(work), "prep": _prep(work), "finish": {"finish": 1.0}}
    loaded = False
    for stage in ("baseline", "train", "eval", "export"):
        if stage not in ran:
            continue
        quantities = _BY_STAGE[stage](work)
        if not loaded:
            quantities |= {"load": 1.0, "load, GiB": work.base_bytes / GIB}
            loaded = True
        found[stage] = quantities
    return {stage: found[stage] for stage in STAGES if stage in ran}


def _start(work: Work) -> dict[str, float]:
    return {"start": 1.0, "start, GiB": work.base_bytes / GIB}


def _prep(work: Work) -> dict[str, float]:
    return {"prep": 1.0, "prep, 1,000 rows": work.prep_rows / 1e3}


def _evaluation(work: Work) -> dict[str, float]:
    tokens = work.answers * work.new_tokens
    return {
        "evaluation": 1.0,
        "evaluation, 1,000 decoding steps of a layer": tokens / work.slots * work.layers / 1e3,
        "evaluation, million tokens of a layer": tokens * work.layers / 1e6,
        "evaluation, 100 answers": work.answers / 100,
    }


def _training(work: Work) -> dict[str, float]:
    layers, kind = work.layers, "compiled training" if work.compiled else "training"
    return {
        "training": 1.0,
        "training, 1,000 rows": work.train_rows / 1e3,
        **({"compiled training": 1.0} if work.compiled else {}),
        f"{kind}, 1,000 passes of a layer": work.passes * layers / 1e3,
        f"{kind}, million tokens of a layer": work.tokens * layers / 1e6,
        "training, 1,000 million trained weights": work.steps * work.trainable / 1e9,
        "validation, million tokens of a layer": work.validated_tokens * layers / 1e6,
    }


def _export(work: Work) -> dict[str, float]:
    if not work.merged_bytes:
        return {"export": 0.1}
    return {"export": 1.0, "export, GiB": work.merged_bytes / GIB}


_BY_STAGE = {"baseline": _evaluation, "train": _training, "eval": _evaluation, "export": _export}

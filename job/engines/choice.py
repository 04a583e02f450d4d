"""Which engine trains: the one that the spec names, or by `auto` the one measured faster."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from job.engines.device import Accelerator
from job.errors import SpecError
from job.spec.types import JobSpec

Name = Literal["transformers", "unsloth"]
FIELD = "$.model.engine"
PACKAGES = ("unsloth", "unsloth_zoo")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Tokens a second of the same rows with each engine, as `benchmarks/engines.py` records it."""

    family: str
    device: str
    """The GPU's name as torch has it."""
    compiled: bool
    """Whether `train.torch_compile` was on, for both."""
    transformers: float
    unsloth: float

    def is_of(self, family: str | None, device: str, *, compiled: bool) -> bool:
        """Whether it was such a step on such a device: `h200` stands for `NVIDIA H200`."""
        words = set(device.lower().split()) <= set(self.device.lower().split())
        return (family, compiled) == (self.family, self.compiled) and words


MEASURED: tuple[Measured, ...] = (
    Measured(
        family="ernie45_vl",
        device="NVIDIA H200",
        compiled=False,
        transformers=19689.7,
        unsloth=8338.7,
    ),
    Measured(
        family="vlm", device="NVIDIA H200", compiled=False, transformers=15967.3, unsloth=12570.7
    ),
)
"""Of each family, device and way, the newest. What is not here nobody has measured, and
`transformers` trains it."""

UNCOMPILED = ("ernie45_vl",)
"""Families whose step Unsloth's compiled forward passes break off."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    engine: Name
    reason: str


def installed() -> Collection[str]:
    """Those of `PACKAGES` that this environment has; none is imported."""
    return [name for name in PACKAGES if find_spec(name) is not None]


def choose(
    spec: JobSpec,
    family: str | None,
    accelerator: Accelerator,
    *,
    processes: int = 1,
    present: Collection[str] | None = None,
    measured: Collection[Measured] = MEASURED,
) -> Choice:
    """The engine that trains `spec` on the accelerator; `family` is the model's, None if not known.

    `present` are the packages to count on, this environment's by default. Raises SpecError where
    the spec names an engine that cannot train it here; `auto` never does.
    """
    present = installed() if present is None else present
    if spec.model.engine == "transformers":
        return Choice(engine="transformers", reason="the spec names it")
    hindrance = _hindrance(spec, family, accelerator, processes, present)
    if spec.model.engine == "unsloth":
        if hindrance is not None:
            raise hindrance
        return Choice(engine="unsloth", reason="the spec names it")
    if accelerator.kind == "cpu":
        return Choice(engine="transformers", reason="auto; there is no GPU")
    compiled = spec.train.torch_compile
    alike = (m for m in measured if m.is_of(family, accelerator.name, compiled=compiled))
    found = next(alike, None)
    if found is None:
        on = f"{family or 'this model'} on {accelerator.name}"
        return Choice(engine="transformers", reason=f"auto; unsloth is not measured for {on}")
    reason = (
        f"auto; measured with transformers {found.transformers:,.0f} tokens a second, with "
        f"unsloth {found.unsloth:,.0f}"
    )
    if found.unsloth <= found.transformers:
        return Choice(engine="transformers", reason=reason)
    if hindrance is not None:
        said = hindrance.problems[0]
        return Choice(engine="transformers", reason=f"{reason}, but {said.message}")
    return Choice(engine="unsloth", reason=reason)


def _hindrance(
    spec: JobSpec,
    family: str | None,
    accelerator: Accelerator,
    processes: int,
    present: Collection[str],
) -> SpecError | None:
    """Why Unsloth cannot train the spec here; what a spec alone tells is refused with the spec."""
    plain = "write transformers, or auto"
    if accelerator.kind == "cpu":
        return SpecError(FIELD, "needs a GPU, and torch sees none", value="unsloth", fix=plain)
    if processes > 1:
        return SpecError(
            FIELD,
            f"trains in one process, and {processes} were started",
            value="unsloth",
            fix="start one process, or write transformers",
        )
    if missing := [name for name in PACKAGES if name not in present]:
        return SpecError(
            FIELD,
            f"the package {missing[0]} is not installed",
            value="unsloth",
            fix=f'make setup EXTRAS="gpu unsloth", or {plain}',
        )
    if spec.train.torch_compile and family in UNCOMPILED:
        return SpecError(
            "$.train.torch_compile",
            f"must be false where unsloth trains the family {family}: its compiled step breaks off",
            value=True,
            fix="remove the line, or set model.engine: transformers",
        )
    if (spec.lora.method, spec.model.init, spec.lora.use_dora) != ("lora", "pretrained", False):
        return SpecError(
            FIELD,
            "trains plain adapters on weights that it reads, and nothing else",
            value="unsloth",
            fix=plain,
        )
    return None

"""Selects the engine: the one that the spec names or, for `auto`, the one measured to be faster."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from job.engines.device import Accelerator
from job.errors import SpecError
from job.spec.types import JobSpec

EngineName = Literal["transformers", "unsloth"]
FIELD = "$.model.engine"
PACKAGES = ("unsloth", "unsloth_zoo")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Tokens per second of both engines on the same rows, measured by `benchmarks/engines.py`."""

    family: str
    device: str
    """The GPU's name in torch."""
    compiled: bool
    """Whether both were measured with `train.torch_compile`."""
    transformers: float
    unsloth: float

    def matches(self, family: str | None, device: str, *, compiled: bool) -> bool:
        """Whether it measured this family on this device: `h200` matches `NVIDIA H200`."""
        same_device = set(device.lower().split()) <= set(self.device.lower().split())
        return (family, compiled) == (self.family, self.compiled) and same_device


MEASURED: tuple[Measurement, ...] = (
    Measurement(
        family="ernie45_vl",
        device="NVIDIA H200",
        compiled=False,
        transformers=19689.7,
        unsloth=8338.7,
    ),
    Measurement(
        family="vlm", device="NVIDIA H200", compiled=False, transformers=15967.3, unsloth=12570.7
    ),
)
"""The newest measurement for each family, device and mode; without one, `auto` selects
`transformers`."""

CRASHES_COMPILED = ("ernie45_vl",)
"""Families whose training step crashes with Unsloth's compiled forward passes."""


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    engine: EngineName
    reason: str


def installed() -> Collection[str]:
    """The installed ones of `PACKAGES`; imports none of them."""
    return [name for name in PACKAGES if find_spec(name) is not None]


def choose(
    spec: JobSpec,
    family: str | None,
    accelerator: Accelerator,
    *,
    processes: int = 1,
    present: Collection[str] | None = None,
    measured: Collection[Measurement] = MEASURED,
) -> EngineChoice:
    """The engine that trains `spec` on the accelerator; `family` is None if it is unknown.

    `present` are the available packages, by default this environment's. Raises SpecError if the
    spec names an engine that cannot train it here; `auto` never raises.
    """
    present = installed() if present is None else present
    if spec.model.engine == "transformers":
        return EngineChoice(engine="transformers", reason="the spec names it")
    obstacle = _obstacle(spec, family, accelerator, processes, present)
    if spec.model.engine == "unsloth":
        if obstacle is not None:
            raise obstacle
        return EngineChoice(engine="unsloth", reason="the spec names it")
    if accelerator.kind == "cpu":
        return EngineChoice(engine="transformers", reason="auto; there is no GPU")
    compiled = spec.train.torch_compile is True  # unsloth compiles only if asked to
    matching = (m for m in measured if m.matches(family, accelerator.name, compiled=compiled))
    speed = next(matching, None)
    if speed is None:
        on = f"{family or 'this model'} on {accelerator.name}"
        return EngineChoice(engine="transformers", reason=f"auto; unsloth is not measured for {on}")
    reason = (
        f"auto; measured with transformers {speed.transformers:,.0f} tokens a second, with "
        f"unsloth {speed.unsloth:,.0f}"
    )
    if speed.unsloth <= speed.transformers:
        return EngineChoice(engine="transformers", reason=reason)
    if obstacle is not None:
        return EngineChoice(
            engine="transformers", reason=f"{reason}, but {obstacle.problems[0].message}"
        )
    return EngineChoice(engine="unsloth", reason=reason)


def require_family(spec: JobSpec, family: str) -> None:
    """Raises SpecError if the spec names an engine that cannot train the family on any machine."""
    if spec.model.engine == "unsloth" and (crash := _crash(spec, family)) is not None:
        raise crash


def _crash(spec: JobSpec, family: str | None) -> SpecError | None:
    if spec.train.torch_compile is not True or family not in CRASHES_COMPILED:
        return None
    return SpecError(
        "$.train.torch_compile",
        f"must be false if unsloth trains the family {family}: its step crashes when compiled",
        value="true",
        fix="remove the line, or set model.engine: transformers",
    )


def _obstacle(
    spec: JobSpec,
    family: str | None,
    accelerator: Accelerator,
    processes: int,
    present: Collection[str],
) -> SpecError | None:
    """Why Unsloth cannot train the spec here; spec validation has rejected other cases already."""
    other_engine = "set model.engine: transformers, or auto"
    if spec.reinforce is not None:
        return SpecError(
            FIELD, "does not run reinforce", value="unsloth", fix="set model.engine: transformers"
        )
    if accelerator.kind == "cpu":
        return SpecError(
            FIELD, "needs a GPU, but torch sees none", value="unsloth", fix=other_engine
        )
    if processes > 1:
        return SpecError(
            FIELD,
            f"trains in one process, but {processes} were started",
            value="unsloth",
            fix="start one process, or set model.engine: transformers",
        )
    if missing := [name for name in PACKAGES if name not in present]:
        return SpecError(
            FIELD,
            f"the package {missing[0]} is not installed",
            value="unsloth",
            fix=f'make setup EXTRAS="gpu unsloth", or {other_engine}',
        )
    if (crash := _crash(spec, family)) is not None:
        return crash
    if spec.model.load_in_4bit:
        return SpecError(
            FIELD,
            "does not load a base in 4 bits in this version",
            value="unsloth",
            fix="set model.engine: transformers, or model.load_in_4bit: false",
        )
    if spec.train.neftune_noise_alpha is not None:
        return SpecError(
            "$.train.neftune_noise_alpha",
            "must be null if unsloth trains: its forward passes add no noise",
            value=spec.train.neftune_noise_alpha,
            fix="remove the line, or set model.engine: transformers",
        )
    if spec.lora.finetune_experts or (
        (spec.lora.method, spec.model.init, spec.lora.use_dora) != ("lora", "pretrained", False)
    ):
        return SpecError(
            FIELD,
            "trains plain LoRA adapters on pretrained weights only",
            value="unsloth",
            fix=other_engine,
        )
    return None

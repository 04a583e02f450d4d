"""Which engine would train on each of the planned devices."""

from collections.abc import Mapping

from job.engines.choice import choose
from job.engines.device import Accelerator
from job.errors import SpecError
from job.spec.types import JobSpec


def engine_of(spec: JobSpec, family: str, devices: Mapping[str, Accelerator]) -> str:
    """The engine as text: with the reason if there is one device, per device if they differ."""
    try:
        choices = {name: choose(spec, family, device) for name, device in devices.items()}
    except SpecError as error:
        return f"{spec.model.engine}, refused here: {error.problems[0].message}"
    if len(choices) == 1:
        [only] = choices.values()
        return f"{only.engine}: {only.reason}"
    by_engine: dict[str, list[str]] = {}
    for name, choice in choices.items():
        by_engine.setdefault(choice.engine, []).append(name)
    if len(by_engine) == 1:
        return next(iter(by_engine))
    return "; ".join(f"{engine} on {', '.join(names)}" for engine, names in by_engine.items())

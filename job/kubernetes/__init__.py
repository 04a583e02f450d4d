"""Kubernetes manifests from a spec: `job manifest`, and the folder `k8s/`.

Imports: spec, storage, families, planning.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from job.errors import UsageError
from job.kubernetes import batch, layout, rules, serving, trainjob, yaml_text
from job.kubernetes.context import Object, Request
from job.kubernetes.options import Order
from job.kubernetes.platforms import PLATFORMS, platform

__all__ = ["Order", "folder", "render", "write"]

KINDS: Mapping[str, Callable[[Request], list[Object]]] = {
    "job": batch.bundle,
    "trainjob": trainjob.bundle,
    "vllm": serving.deployment,
    "vllm-smoke": serving.smoke_job,
}
SEVERAL = 2
"""Nodes of a folder's TrainJob where no number is given."""
COMMENT = "Made by `python -m job manifest`: change the spec and make it again."


def render(order: Order, on: str, nodes: int = 1, kind: str = "job") -> str:
    """One manifest as YAML; several nodes make the job a TrainJob.

    Raises what `Order.request` does, and UsageError for an unknown platform or kind.
    """
    if kind not in KINDS:
        raise UsageError("--kind", f"must be one of {', '.join(KINDS)}", value=kind)
    bundle = trainjob.bundle if kind == "job" and nodes > 1 else KINDS[kind]
    return _text(_sound(bundle(order.request(platform(on), nodes))))


def folder(order: Order, nodes: int = 1, smoke: str | None = None) -> Mapping[str, str]:
    """All manifests of a spec with their overlays, by path; `smoke` names the spec of the test."""
    test = replace(order, spec=smoke, sets=(), output=None) if smoke else None
    wanted = layout.Wanted(
        amd=order.request(PLATFORMS["amd"]),
        nvidia=order.request(PLATFORMS["nvidia"]),
        several=order.request(PLATFORMS["amd"], max(nodes, SEVERAL)),
        smoke=test.request(PLATFORMS["cpu"]) if test else None,
    )
    return {path: _text(found) for path, found in layout.files(wanted).items()}


def write(directory: Path, files: Mapping[str, str]) -> None:
    """Writes a folder; what else is in it stays."""
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(content, encoding="utf-8")


def _sound(documents: list[Object]) -> list[Object]:
    problems = rules.problems(documents)
    assert not problems, "\n".join(problems)
    return documents


def _text(documents: list[Object]) -> str:
    return yaml_text.dump(documents, COMMENT)

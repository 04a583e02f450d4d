"""Pushes the export of a run to the hub."""

from pathlib import Path
from typing import Any

from job import log
from job.export.push import HubRepository, HubTarget, commit_title, layout
from job.pipeline.context import RunContext
from job.spec.output_folders import ADAPTER, MERGED, SERVED_ADAPTER
from job.spec.types import JobSpec

_SHOWN = 3  # names in a warning


def content(spec: JobSpec) -> str:
    """What is pushed: `adapter`, `merged` or `all`."""
    chosen: str = spec.export.hub_content
    if chosen == "auto":
        return "adapter" if spec.lora.method == "lora" else "merged"
    return chosen


def prepare(spec: JobSpec) -> None:
    """Checks before any work that the export can be pushed, and creates the repository."""
    repository = HubRepository(HubTarget.of(spec.export))
    found = repository.require_writable()
    repository.create()
    log.info("the export will be pushed to the hub", repository=found)
    if held := repository.weights():
        log.warn(
            "the repository holds weights, which the push replaces; its history keeps them",
            files=", ".join(held[:_SHOWN]) + (" …" if len(held) > _SHOWN else ""),
            fix="if they are of another model, set export.hub_revision to a branch for this one, "
            "or export.hub_model_id to another repository",
        )


def push(run: RunContext) -> dict[str, Any]:
    """Pushes the export; returns the stage's summary."""
    spec, stages = run.spec, run.record.stages
    trained, prefix = run.inputs.trained_by, run.trained_folder
    adapter = [
        (path.removeprefix(prefix), file)
        for stage, folder in ((trained, ADAPTER), ("card", ADAPTER), (trained, SERVED_ADAPTER))
        for path, file in _files(run, stage, f"{prefix}{folder}")
    ]
    merged = [*_files(run, "export", MERGED), *_files(run, "card", MERGED)]
    metrics = run.record.metrics
    title = commit_title(spec.name, metrics.get("baseline", {}), metrics.get("final", {}))
    description = (
        f"Made by finetune-job {run.record.versions['job']} "
        f"(training {stages[trained].fingerprint[:12]})."
    )
    repository = HubRepository(HubTarget.of(spec.export))
    files = layout(content(spec), adapter, merged)
    repository.create()  # if it was removed since the start, or the spec did not push then
    pushed = repository.push(files, title, description)
    log.info(
        "pushed to the hub" if pushed.changed else "the hub has these files already",
        repository=pushed.repository,
        revision=pushed.revision,
        commit=pushed.commit[:12],
        size=log.byte_count(pushed.bytes),
    )
    return {**pushed.to_json(), "content": content(spec)}


def _files(run: RunContext, stage: str, folder: str) -> list[tuple[str, Path]]:
    """The stage's files below the folder, by path at the output; those of a run on another machine
    are downloaded.
    """
    record = run.record.stages.get(stage)
    if record is None or not any(file.path.startswith(f"{folder}/") for file in record.files):
        return []
    directory = run.output.stages.local.fetch(record)
    return [
        (file.path, directory / file.path)
        for file in record.files
        if file.path.startswith(f"{folder}/")
    ]

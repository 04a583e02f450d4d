"""`output.uri: hf://org/name[@branch]`: short for the keys that push the export there.

A repository cannot hold a run's state: every file would be a commit, and no lease would be safe. So
the state is kept in a local folder, and the finished export is pushed as one commit.
"""

import re
from typing import TypeVar, cast

from job.spec.keys import Json
from job.spec.types import JobSpec

T = TypeVar("T")

HUB = "hf://"
_REPOSITORY = re.compile(
    r"hf://(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<branch>[^\s@]+))?/?"
)
_OTHER_KINDS = ("hf://datasets/", "hf://spaces/", "hf://buckets/")


def parse(uri: str) -> tuple[str, str | None] | None:
    """The repository and branch; None if the URI is not one of a model repository's top."""
    match = _REPOSITORY.fullmatch(uri)
    if match is None or uri.startswith(_OTHER_KINDS):
        return None
    return match["id"], match["branch"]


def expand(values: T) -> T:
    """The `values` of a valid, complete spec, with the keys that such an output stands for."""
    spec = cast(dict[str, dict[str, Json]], values)
    uri = str(spec["output"]["uri"])
    target = parse(uri)
    if target is None:
        return values
    repository, branch = target
    push: dict[str, Json] = {"push_to_hub": True, "hub_model_id": repository}
    if branch is not None:
        push["hub_revision"] = branch
    folder = state_folder(str(spec["runtime"]["cache_dir"]), repository, branch)
    expanded = {
        **spec,
        "export": {**spec["export"], **push},
        "output": {**spec["output"], "uri": folder},
    }
    return cast(T, expanded)


def is_output_of(spec: JobSpec) -> bool:
    """Whether the spec's output was a repository, so that its state is in the local folder."""
    export = spec.export
    return export.hub_model_id is not None and spec.output.uri == state_folder(
        spec.runtime.cache_dir, export.hub_model_id, export.hub_revision
    )


def state_folder(cache_dir: str, repository: str, branch: str | None) -> str:
    """The local folder of a run whose output is a repository."""
    name = f"{repository}@{branch}" if branch else repository
    return f"{cache_dir.rstrip('/')}/outputs/{name.replace('/', '--')}"

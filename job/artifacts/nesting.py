"""Refuses nested outputs: each run would delete files of the other."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from job import storage
from job.errors import JobError, SpecError
from job.spec.output_folders import FOLDERS
from job.storage import retry

RUN, RESOLVED = "run.json", "spec.resolved.yaml"
"""The files that every run writes first."""


def refuse_nested(output: str) -> None:
    """Raises SpecError if `output` is inside another run's, or contains one in a run folder.

    Ignores folders that cannot be read.
    """
    ancestors = tuple(_ancestors(output))
    below = {storage.join(output, folder): folder for folder in FOLDERS}
    with ThreadPoolExecutor(8, "nesting") as pool:
        folders = [*ancestors, *below]
        runs = set(itertools.compress(folders, pool.map(_is_run, folders)))
    for uri in ancestors:
        if uri in runs:
            raise SpecError(
                "$.output.uri",
                f"is inside the output of another run, {uri}",
                value=output,
                fix=f"name a folder beside that, such as {uri}-{storage.name(output)}",
            )
    for uri, folder in below.items():
        if uri in runs:
            raise SpecError(
                "$.output.uri",
                f"its folder {folder}/, which this run writes, is the output of another run",
                value=output,
                fix="name another folder",
            )


def run_containing(uri: str) -> str | None:
    """The output of the run that `uri` belongs to: the output itself or one of its run folders.

    None if there is no such run; other folders beside the run's belong to the user.
    """
    below = ""
    for folder in (uri, *_ancestors(uri)):
        first = below.partition("/")[0]
        if (not first or first in FOLDERS) and _is_run(folder):
            return folder
        below = f"{storage.name(folder)}/{below}"
    return None


def _ancestors(output: str) -> Iterator[str]:
    """The ancestors of `output`, with symbolic links resolved."""
    uri = str(storage.resolved_path(output)) if storage.is_local(output) else output
    while (parent := storage.parent(uri)) != uri:
        yield parent
        uri = parent


def _is_run(uri: str) -> bool:
    try:
        with retry.at_most(0):
            return all(storage.is_file(storage.join(uri, file)) for file in (RUN, RESOLVED))
    except JobError:
        return False

"""No run in a folder that another run writes to: one would remove what the other wrote."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from job import storage
from job.errors import JobError, SpecError
from job.spec.rules.locations import FOLDERS
from job.storage import retry

RUN, RESOLVED = "run.json", "spec.resolved.yaml"
"""What every run leaves before anything else."""


def refuse_nested(output: str) -> None:
    """Raises SpecError if `output` is in another run's, or has one in a folder that it writes.

    Folders that may not be looked at are taken for none of a run.
    """
    above = tuple(_above(output))
    below = {storage.join(output, folder): folder for folder in FOLDERS}
    with ThreadPoolExecutor(8, "nesting") as pool:
        places = [*above, *below]
        runs = {
            place for place, found in zip(places, pool.map(_is_run, places), strict=True) if found
        }
    for place in above:
        if place in runs:
            raise SpecError(
                "$.output.uri",
                f"lies in the output of another run, {place}",
                value=output,
                fix=f"name a folder beside that, such as {place}-{storage.name(output)}",
            )
    for place, folder in below.items():
        if place in runs:
            raise SpecError(
                "$.output.uri",
                f"its folder {folder}/, which this run writes, is the output of another run",
                value=output,
                fix="name another folder",
            )


def run_written_at(place: str) -> str | None:
    """The run whose output `place` is, or in one of whose folders it lies; None if there is none.

    What a user keeps in a folder beside those is no run's.
    """
    below = ""
    for folder in (place, *_above(place)):
        first = below.partition("/")[0]
        if (not first or first in FOLDERS) and _is_run(folder):
            return folder
        below = f"{storage.name(folder)}/{below}"
    return None


def _above(output: str) -> Iterator[str]:
    """Every folder that `output` is in, as links lead."""
    place = output
    if storage.is_local(output):
        place = str(storage.local_path(output).resolve())
    while (parent := storage.parent(place)) != place:
        yield parent
        place = parent


def _is_run(place: str) -> bool:
    try:
        with retry.at_most(0):
            return all(storage.is_file(storage.join(place, file)) for file in (RUN, RESOLVED))
    except JobError:
        return False

"""Stage markers, `.stages/NAME.json`: written last; a stage without one is incomplete."""

import json

from job import log, storage
from job.artifacts.records import STAGES, StageRecord
from job.artifacts.unfinished import SUFFIX
from job.artifacts.writer import Writer
from job.errors import MissingInputError


class StageMarkers:
    """The markers at the output that `writer` writes to."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def exists(self, name: str) -> bool:
        return storage.is_file(self._writer.at(self._path(name)))

    def read(self, name: str) -> StageRecord | None:
        """The stage's record, whatever its fingerprint; None if missing or unreadable.

        Raises InputError if access is denied: treating the marker as missing would rerun the stage
        and delete its files.
        """
        try:
            marker = storage.read_bytes(self._writer.at(self._path(name)))
        except MissingInputError:
            return None
        try:
            return StageRecord.parse(marker)
        except ValueError as error:
            log.warn("stage marker unreadable; the stage runs again", stage=name, reason=error)
            return None

    def names(self) -> tuple[str, ...]:
        """The stages that have a marker."""
        return tuple(
            entry.path.removesuffix(".json")
            for entry in storage.list_files(self._writer.at(STAGES))
            if not entry.path.endswith(SUFFIX)
        )

    def write(self, record: StageRecord) -> None:
        text = json.dumps(record.to_json(), indent=2) + "\n"
        self._writer.write_text(self._path(record.name), text)

    def delete(self, name: str) -> None:
        self._writer.delete(self._path(name))

    def _path(self, name: str) -> str:
        return f"{STAGES}/{name}.json"

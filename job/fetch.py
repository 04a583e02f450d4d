"""`job fetch`: a part of a finished run, on this machine, checked against its `SHA256SUMS`."""

from pathlib import Path

from job import log, storage
from job.errors import InputError
from job.manifest import sha256_file
from job.outputs import SUCCESS, SUMS
from job.storage.uri import safe_relative


def fetch(uri: str, part: str, directory: Path) -> int:
    """Brings the files of folder `part` of the run at `uri`; gives their number.

    What is there already and whole is kept. Raises InputError where the run is not finished, has
    no such part, or a file is not what the run wrote.
    """
    if not storage.exists(storage.join(uri, SUCCESS)):
        raise InputError(
            storage.join(uri, SUCCESS),
            "is missing, so the run is not finished",
            fix="wait for the job, or name the output of one that succeeded",
        )
    wanted = {}
    for line in storage.read_text(storage.join(uri, SUMS)).splitlines():
        digest, _, path = line.partition("  ")
        if path.startswith(f"{part}/"):
            wanted[safe_relative(path, uri)] = digest
    if not wanted:
        raise InputError(
            storage.join(uri, part), "the run has no such part", fix="adapter or merged are usual"
        )
    with log.progress(f"fetch {part}", len(wanted), "files") as bar:
        for path, digest in wanted.items():
            target = directory / path.removeprefix(f"{part}/")
            if not (target.is_file() and sha256_file(target) == digest):
                storage.download(storage.join(uri, path), target)
                if sha256_file(target) != digest:
                    target.unlink()
                    raise InputError(
                        storage.join(uri, path),
                        "is not what the run wrote: its SHA-256 differs",
                        fix="export again",
                    )
            bar.advance()
    return len(wanted)

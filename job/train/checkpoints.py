"""Training checkpoints at the output: files first, `manifest.json` last.

A checkpoint is believed only with its manifest, and only where every file has the size and
digest that it names; `latest` passes over the others and says why. One with a pickle in it is
refused: reading that runs code.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import log, storage
from job.errors import InputError, MissingInputError
from job.manifest import FileDigest, digest_tree
from job.writer import Writer

MANIFEST = "manifest.json"
_STEP = re.compile(r"^step-(\d+)$")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class CheckpointStore:
    """The checkpoints of one training, under `uri`, with its fingerprint."""

    uri: str
    fingerprint: str
    writer: Writer | None = None
    """What stores and removes them; without it, at a place that no other job writes to."""

    def save(self, directory: Path, step: int, loss: float | None = None) -> None:
        """Stores the checkpoint in `directory` as `step-N`; visible only when whole.

        `loss` is what it is compared by where the best is kept: lower is better.
        """
        files = digest_tree(directory)
        manifest = {
            "step": step,
            "fingerprint": self.fingerprint,
            "loss": loss,
            "size": sum(file.size for file in files),
            "files": [file.to_json() for file in files],
        }
        files_of = self._writer.inside(_name(step))
        files_of.delete(MANIFEST)
        files_of.upload_tree(directory)
        files_of.write_text(MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def steps(self) -> tuple[int, ...]:
        """The steps of which anything is stored, oldest first."""
        found = {
            int(match[1])
            for entry in storage.list_files(self.uri)
            if (match := _STEP.match(entry.path.split("/")[0]))
        }
        return tuple(sorted(found))

    def newest(self) -> int | None:
        """The newest step that this training stored whole, by its manifest; no file is read."""
        for step in reversed(self.steps()):
            try:
                if self._manifest(self.at(step)).get("fingerprint") == self.fingerprint:
                    return step
            except (MissingInputError, ValueError):
                continue
        return None

    def latest(self, directory: Path) -> str | None:
        """Fetches the newest valid checkpoint of this training: its URI, or None without one.

        Raises StorageError where the store is away or the disk is full, and InputError where what
        is stored may not be read: steps must not be trained anew because of that.
        """
        for step in reversed(self.steps()):
            problem = self._fetch(self.at(step), directory, any_fingerprint=False)
            if problem is None:
                return self.at(step)
            log.warn("checkpoint skipped", step=step, reason=problem)
        return None

    def prune(self, keep: int, reached: int) -> None:
        """Removes all but the newest `keep` checkpoints and the best, each manifest first.

        What is not whole, or another training's, goes too: nobody would resume from it here. Those
        past the step `reached` were there before a resume that could not take them. They stay until
        they are written anew, and take no place: a damaged one must not displace a good one.

        Raises InputError where a manifest may not be read, before anything is removed.
        """
        losses: dict[int, float] = {}
        ahead = set[int]()
        for step in (every := self.steps()):
            try:
                manifest = self._manifest(self.at(step))
            except (MissingInputError, ValueError):
                continue
            if manifest.get("fingerprint") != self.fingerprint:
                continue
            if step > reached:
                ahead.add(step)
            else:
                loss = manifest.get("loss")
                losses[step] = float("inf") if loss is None else float(loss)
        kept = set(sorted(losses)[-keep:])
        if losses:
            kept.add(min(losses, key=lambda step: (losses[step], -step)))
        for step in every:
            if step not in kept | ahead:
                self._writer.delete(f"{_name(step)}/{MANIFEST}")
                self._writer.delete_tree(_name(step))

    def fetch(self, uri: str, directory: Path) -> Path:
        """Fetches the checkpoint at `uri`, which may be another training's.

        Raises InputError where it is missing or damaged.
        """
        problem = self._fetch(uri, directory, any_fingerprint=True)
        if problem is not None:
            raise InputError(
                "$.train.resume_from_checkpoint",
                problem,
                value=uri,
                fix="name a folder checkpoints/step-N of a run, or use auto",
            )
        return directory

    def _fetch(self, source: str, directory: Path, *, any_fingerprint: bool) -> str | None:
        """Downloads a checkpoint; gives what is wrong with it, or None."""
        try:
            manifest = self._manifest(source)
            wanted = [FileDigest.from_json(file) for file in manifest["files"]]
        except MissingInputError:
            return "it has no manifest, so it was not stored whole"
        except (ValueError, KeyError, TypeError) as error:
            return f"its manifest is unreadable: {error}"
        if not any_fingerprint and manifest.get("fingerprint") != self.fingerprint:
            return "it belongs to another spec, model or data set"
        for file in wanted:
            if file.path.endswith(_PICKLES):
                return f"{file.path} is a pickle, which runs code when it is read"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        try:
            for file in wanted:
                storage.download(storage.join(source, file.path), directory / file.path)
        except MissingInputError as error:
            return f"a file cannot be read: {error.problems[0].message}"
        found = {file.path: file for file in digest_tree(directory)}
        for file in wanted:
            if found.get(file.path) != file:
                return f"{file.path} is damaged: its digest is not the manifest's"
        return None

    @staticmethod
    def _manifest(source: str) -> dict[str, Any]:
        """The manifest of the checkpoint at `source`; ValueError where it is no JSON object."""
        manifest = json.loads(storage.read_bytes(storage.join(source, MANIFEST)))
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
        return manifest

    def at(self, step: int) -> str:
        """The URI of a step's checkpoint."""
        return storage.join(self.uri, _name(step))

    @property
    def _writer(self) -> Writer:
        return Writer(self.uri, lease=None) if self.writer is None else self.writer


def _name(step: int) -> str:
    return f"step-{step}"

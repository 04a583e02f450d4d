"""Stores training checkpoints at the output: files first, `manifest.json` last.

A checkpoint is valid only if it has a manifest, every file has the size and digest listed there,
and the content matches the training in memory; `latest` skips invalid ones and logs why. Pickles
are rejected, because reading one runs code.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job import log, storage
from job.artifacts.writer import Writer
from job.errors import InputError, MissingInputError
from job.storage.digests import FileDigest, digest_tree
from job.train.identity import changes
from job.train.schedule import Schedule

MANIFEST = "manifest.json"
_STEP = re.compile(r"^step-(\d+)$")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")

ContentCheck = Callable[[Path], str | None]
"""Returns what is wrong with the checkpoint in a folder, or None."""


def _unchecked(directory: Path) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class CheckpointStore:
    """The checkpoints of one training under `uri`, with its fingerprint."""

    uri: str
    fingerprint: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    """The fingerprint's inputs, stored so that a mismatch can be explained."""
    schedule: Schedule | None = None
    """None until the training's length is known; until then any length is accepted."""
    writer: Writer | None = None
    """Writes under the output's lease; None if no other job writes to `uri`."""

    def save(
        self,
        directory: Path,
        step: int,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        others: Sequence[FileDigest] = (),
    ) -> None:
        """Stores the checkpoint in `directory` as `step-N`; valid once it is complete.

        `loss` is the training loss up to the step, and `metrics` are those of its validation, for
        readers of the manifest. `others` are the files that `save_part` has stored.
        """
        files = sorted([*digest_tree(directory), *others], key=lambda file: file.path)
        manifest = {
            "step": step,
            "fingerprint": self.fingerprint,
            "parts": dict(self.parts),
            "total_steps": self.schedule.steps if self.schedule else None,
            "loss": loss,
            "metrics": dict(metrics or {}),
            "size": sum(file.size for file in files),
            "files": [file.to_json() for file in files],
        }
        target = self._writer.inside(_name(step))
        target.delete(MANIFEST)
        target.upload_tree(directory)
        target.write_text(MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def begin(self, step: int) -> None:
        """Invalidates a stored checkpoint of the step, before parts of another are stored."""
        self._writer.inside(_name(step)).delete(MANIFEST)

    def save_part(self, directory: Path, step: int) -> tuple[FileDigest, ...]:
        """Stores files of a checkpoint that `save` completes on another machine, after `begin`.

        That machine has checked the lease of the output, which this one does not hold.
        """
        Writer(self.at(step), lease=None).upload_tree(directory)
        return digest_tree(directory)

    def steps(self) -> tuple[int, ...]:
        """The steps with any stored file, oldest first."""
        steps = {
            int(match[1])
            for entry in storage.list_files(self.uri)
            if (match := _STEP.match(entry.path.split("/")[0]))
        }
        return tuple(sorted(steps))

    def newest(self) -> int | None:
        """The newest complete step of this training; reads manifests only."""
        for step in reversed(self.steps()):
            if self.holds(step):
                return step
        return None

    def latest(self, directory: Path, check: ContentCheck = _unchecked) -> str | None:
        """Fetches the newest valid checkpoint of this training; returns its URI, None without one.

        Raises StorageError if the store is unavailable or the disk is full, and InputError if
        access is denied: none of these may cause finished steps to be trained again.
        """
        steps = self.steps()
        for step in reversed(steps):
            problem = self._fetch(self.at(step), directory, check, step)
            if problem is None:
                return self.at(step)
            log.warn("checkpoint skipped", step=step, reason=problem)
        if steps:
            log.warn("training starts from the beginning: no usable checkpoint", stored=len(steps))
        return None

    def prune(self, keep: int, reached: int, errors: Mapping[int, float] | None = None) -> None:
        """Removes all but the newest `keep` checkpoints and the best, each manifest first.

        The best checkpoint is the one with the lowest of `errors`, by step; if there is none, the
        one with the lowest training loss.

        Incomplete checkpoints, and those of other trainings, are removed too. Checkpoints past step
        `reached` remain from before a resume that could not use them, or other machines are storing
        their parts: they are kept until they are overwritten, but do not count, so that a damaged
        one never displaces a good one.

        Raises InputError if access to a manifest is denied, before anything is removed.
        """
        losses: dict[int, float] = {}
        ahead = set[int]()
        for step in (steps := self.steps()):
            try:
                manifest = self._manifest(self.at(step))
            except (MissingInputError, ValueError):
                if step > reached:
                    ahead.add(step)
                continue
            if self._mismatch(manifest, step) is not None:
                continue
            if step > reached:
                ahead.add(step)
            else:
                loss = manifest.get("loss")
                losses[step] = float("inf") if loss is None else float(loss)
        kept = set(sorted(losses)[-keep:])
        if losses:
            validated = {step: (errors or {})[step] for step in losses if step in (errors or {})}
            if validated:
                kept.add(min(validated, key=lambda step: (validated[step], step)))
            else:
                kept.add(min(losses, key=lambda step: (losses[step], -step)))
        for step in steps:
            if step not in kept | ahead:
                self._writer.delete(f"{_name(step)}/{MANIFEST}")
                self._writer.delete_tree(_name(step))

    def holds(self, step: int) -> bool:
        """Whether the step's checkpoint is complete and this training's; reads its manifest only.

        Raises StorageError if the store is unavailable.
        """
        try:
            return self._mismatch(self._manifest(self.at(step)), step) is None
        except (MissingInputError, ValueError):
            return False

    def fetch_part(
        self, step: int, name: str, directory: Path, *, verified: bool = False
    ) -> str | None:
        """Downloads a file, or a folder, of this training's checkpoint of a step; returns what is
        wrong with it.

        `verified` if rank 0, which knows the training's fingerprint, fetches the same.

        Raises StorageError if the store is unavailable.
        """
        try:
            manifest = self._manifest(self.at(step))
            wanted = [FileDigest.from_json(file) for file in manifest["files"]]
        except MissingInputError:
            return "it is missing or incomplete"
        except (ValueError, KeyError, TypeError) as error:
            return f"its manifest is unreadable: {error}"
        if not verified and (mismatch := self._mismatch(manifest, step)) is not None:
            return mismatch
        part = [file for file in wanted if file.path == name or file.path.startswith(f"{name}/")]
        if not part:
            return f"it has no {name}"
        return self._download(self.at(step), part, directory)

    def fetch(self, uri: str, directory: Path, check: ContentCheck = _unchecked) -> Path:
        """Fetches the checkpoint at `uri`, which may be another training's.

        Raises InputError if it is missing, damaged or another model's.
        """
        problem = self._fetch(uri, directory, check)
        if problem is not None:
            raise InputError(
                "$.train.resume_from_checkpoint",
                problem,
                value=uri,
                fix="name a folder checkpoints/step-N of a run, or use auto",
            )
        return directory

    def _fetch(
        self, source: str, directory: Path, check: ContentCheck, step: int | None = None
    ) -> str | None:
        """Downloads a checkpoint; returns what is wrong with it, or None.

        If `step` is given, it has to be this training's checkpoint of that step.
        """
        try:
            manifest = self._manifest(source)
            wanted = [FileDigest.from_json(file) for file in manifest["files"]]
        except MissingInputError:
            return "it has no manifest, so it is incomplete"
        except (ValueError, KeyError, TypeError) as error:
            return f"its manifest is unreadable: {error}"
        if step is not None:
            if (mismatch := self._mismatch(manifest, step)) is not None:
                return mismatch
            if self.schedule is not None and step > self.schedule.steps:
                return f"it is past the {self.schedule.steps} steps of this training"
        for file in wanted:
            if file.path.endswith(_PICKLES):
                return f"{file.path} is a pickle, and reading one runs code"
        return self._download(source, wanted, directory) or check(directory)

    @staticmethod
    def _download(source: str, wanted: Sequence[FileDigest], directory: Path) -> str | None:
        """Downloads files of the checkpoint at `source`; returns what is wrong with them."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        try:
            for file in wanted:
                storage.download(storage.join(source, file.path), directory / file.path)
        except MissingInputError as error:
            return f"a file cannot be read: {error.problems[0].message}"
        fetched = {file.path: file for file in digest_tree(directory)}
        for file in wanted:
            if fetched.get(file.path) != file:
                return f"{file.path} is damaged: its digest differs from the manifest's"
        return None

    def _mismatch(self, manifest: Mapping[str, Any], step: int) -> str | None:
        """Why the checkpoint belongs to another training; None if it belongs to this one."""
        if manifest.get("fingerprint") != self.fingerprint:
            changed = changes(manifest.get("parts"), self.parts)
            return f"it belongs to another spec, model or data set: {changed}"
        if manifest.get("step") != step:
            return f"its manifest names step {manifest.get('step')}"
        total = manifest.get("total_steps")
        if self.schedule is None or not isinstance(total, int):
            return None
        return self.schedule.conflict(total, step)

    @staticmethod
    def _manifest(source: str) -> dict[str, Any]:
        """The manifest of the checkpoint at `source`; ValueError if it is not a JSON object."""
        manifest = storage.parse_json(storage.read_bytes(storage.join(source, MANIFEST)))
        if not isinstance(manifest, dict):
            raise ValueError("it is not a JSON object")
        return manifest

    def at(self, step: int) -> str:
        """The URI of the step's checkpoint."""
        return storage.join(self.uri, _name(step))

    @property
    def _writer(self) -> Writer:
        return Writer(self.uri, lease=None) if self.writer is None else self.writer


def _name(step: int) -> str:
    return f"step-{step}"

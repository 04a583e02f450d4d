"""What a job is given, found before any work is done, and the identity of what each stage makes.

Equal fingerprints, equal results: a stage whose result has the fingerprint that is asked for need
not be made again.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from job import __version__, families
from job.artifacts.records import StageRecord
from job.families import model_source
from job.prep import discovery, image_identity
from job.prep.source_files import DataSource
from job.spec.types import JobSpec
from job.storage.digests import fingerprint
from job.train.identity import Identity

Stage = Literal["prep", "baseline", "train", "eval", "export", "report"]

# What of the train section changes nothing in the trained weights.
UNTRAINED_KEYS = (
    "per_device_eval_batch_size",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "report_to",
    "logging_dir",
    "resume_from_checkpoint",
    "fit",
)
# What of the data section changes nothing in the prepared rows.
UNPREPARED_KEYS = ("num_proc", "shuffle_buffer_size")
# What changes how a step is computed, and nothing in what is computed.
COMPUTING_KEYS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "group_by_length",
    "torch_compile",
)
# How long a training goes on. Whether its schedule depends on that is in job.train.schedule.
LENGTH_KEYS = ("max_steps", "num_train_epochs")
_EVAL = "$.data.eval"


class StageInputs:
    """The model and the data that a spec names; each is looked for when it is first asked for.

    Raises InputError where one is missing or denied.
    """

    def __init__(self, spec: JobSpec, processes: int) -> None:
        """`processes` train together."""
        self._spec, self._processes = spec, processes

    @cached_property
    def model(self) -> model_source.ModelInput:
        return model_source.find_model(self._spec.model)

    @cached_property
    def sources(self) -> dict[str, DataSource]:
        """What `data` names, by its place in the spec."""
        named = self._spec.data.sources()
        return {place: discovery.find_source(source, place) for place, source in named.items()}

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """What no text of a row may hold; read from the checkpoint's small files."""
        cache_dir = Path(self._spec.runtime.cache_dir).expanduser()
        directory = model_source.fetch_headers(self.model, cache_dir)
        return families.control_tokens(self.model.uri, directory, self._spec.model)

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        return tuple(source for place, source in self.sources.items() if place != _EVAL)

    @property
    def eval_source(self) -> DataSource | None:
        return self.sources.get(_EVAL)

    @property
    def rows_a_step(self) -> int:
        """The rows of one optimizer step, over all forward passes and processes."""
        train = self._spec.train
        passes = train.gradient_accumulation_steps * self._processes
        return train.per_device_train_batch_size * passes

    def fingerprint(self, stage: Stage, made: Mapping[str, StageRecord]) -> str:
        """The identity of the stage's result, from the code's version and all that it reads.

        The report's is known once all stages before it are among those `made`.
        """
        spec = asdict(self._spec)
        if stage == "prep":
            digests = [[source.digest for source in self.sources.values()], self._pictures]
            read = {k: v for k, v in spec["data"].items() if k not in UNPREPARED_KEYS}
            # Which answers are the same decides which rows are held out, and which leak.
            answer, tokens = self._spec.eval.answer, self.control_tokens
            parts: list[Any] = [read, digests, self._spec.train.seed, tokens, answer]
        elif stage == "baseline":
            generation = self.model.generation_digest
            parts = [self.fingerprint("prep", made), self._start, generation, spec["eval"]]
        elif stage == "train":
            parts = [*self._training(made), *(spec["train"][key] for key in COMPUTING_KEYS)]
        elif stage == "eval":
            parts = [self.fingerprint("train", made), self.model.generation_digest, spec["eval"]]
        elif stage == "report":
            # It tells when stages were made and how long they took, so one made again counts.
            told = [(record.fingerprint, record.started) for record in made.values()]
            parts = [told, {k: v for k, v in spec.items() if k not in ("output", "runtime")}]
        else:  # what servers generate by is written beside the weights
            parts = [self.fingerprint("train", made), self.model.generation_digest, spec["export"]]
        return fingerprint(__version__, stage, parts)

    def identity_of_checkpoints(self) -> Identity:
        """A training may go on with its steps computed in another way, on fewer GPUs, say, and
        longer than it was first meant to."""
        spec, trained = asdict(self._spec), self._trained
        named = {
            "data": {k: v for k, v in spec["data"].items() if k not in UNPREPARED_KEYS},
            "model": spec["model"],
            "lora": spec["lora"],
            "train": {k: v for k, v in trained.items() if k not in LENGTH_KEYS},
        }
        parts = {f"{name}.{k}": v for name, section in named.items() for k, v in section.items()}
        parts["the version of the job"] = __version__
        parts["the files of the model"] = self._start
        parts["the images of the data"] = self._pictures
        for place, source in self.sources.items():
            parts[f"the files of {place.removeprefix('$.')}"] = source.digest
        return Identity(parts=parts)

    def _training(self, made: Mapping[str, StageRecord]) -> list[Any]:
        """What a training goes by, however its steps are computed."""
        spec, prepared = asdict(self._spec), self.fingerprint("prep", made)
        return [prepared, self._start, spec["model"], spec["lora"], self._trained]

    @property
    def _trained(self) -> dict[str, Any]:
        """What of the train section, and beside it, decides the trained weights."""
        skipped = (*UNTRAINED_KEYS, *COMPUTING_KEYS)
        trained = {k: v for k, v in asdict(self._spec)["train"].items() if k not in skipped}
        trained["rows_a_step"] = self.rows_a_step
        if self._spec.data.streaming:
            trained["shuffle_buffer_size"] = self._spec.data.shuffle_buffer_size
        trained["sharded"] = self._spec.runtime.distributed == "fsdp2"
        return trained

    @cached_property
    def _pictures(self) -> list[str]:
        """Digests of the pictures that the sources' lists name."""
        named = self._spec.data.sources()
        return [
            image_identity.digest(source, named[place]) for place, source in self.sources.items()
        ]

    @cached_property
    def _start(self) -> list[Any]:
        """What the model is before training."""
        model = self._spec.model
        start: list[Any] = [self.model.weights_digest, model.init, model.family, model.dtype]
        return [*start, self._spec.train.seed] if model.init == "random" else start

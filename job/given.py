"""What a job is given, found before any work is done, and the identity of what each stage makes.

Equal fingerprints, equal results: a stage whose result has the fingerprint that is asked for need
not be made again.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

from job import __version__, inputs
from job.manifest import StageRecord, fingerprint
from job.prep import find, pictures
from job.spec.types import JobSpec

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
_EVAL = "$.data.eval"


class Given:
    """The model and the data that a spec names; each is looked for when it is first asked for.

    Raises InputError where one is missing or denied.
    """

    def __init__(self, spec: JobSpec, processes: int) -> None:
        """`processes` train together."""
        self._spec, self._processes = spec, processes

    @cached_property
    def model(self) -> inputs.ModelInput:
        return inputs.find_model(self._spec.model)

    @cached_property
    def sources(self) -> dict[str, find.StagedSource]:
        """What `data` names, by its place in the spec."""
        named = self._spec.data.sources()
        return {place: find.stage_source(source, place) for place, source in named.items()}

    @property
    def train_sources(self) -> tuple[find.StagedSource, ...]:
        return tuple(source for place, source in self.sources.items() if place != _EVAL)

    @property
    def eval_source(self) -> find.StagedSource | None:
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
            parts: list[Any] = [read, digests, self._spec.train.seed, self._spec.eval.answer]
        elif stage == "baseline":
            parts = [self.fingerprint("prep", made), self._start, spec["eval"]]
        elif stage == "train":
            parts = [*self._training(made), *(spec["train"][key] for key in COMPUTING_KEYS)]
        elif stage == "eval":
            parts = [self.fingerprint("train", made), spec["eval"]]
        elif stage == "report":
            # It tells when stages were made and how long they took, so one made again counts.
            told = [(record.fingerprint, record.started) for record in made.values()]
            parts = [told, {k: v for k, v in spec.items() if k not in ("output", "runtime")}]
        else:
            parts = [self.fingerprint("train", made), spec["export"]]
        return fingerprint(__version__, stage, parts)

    def identity_of_checkpoints(self, made: Mapping[str, StageRecord]) -> str:
        """A training may go on with its steps computed in another way: on fewer GPUs, say."""
        return fingerprint(__version__, "checkpoints", self._training(made))

    def _training(self, made: Mapping[str, StageRecord]) -> list[Any]:
        """What a training goes by, however its steps are computed."""
        spec = asdict(self._spec)
        skipped = (*UNTRAINED_KEYS, *COMPUTING_KEYS)
        trained = {k: v for k, v in spec["train"].items() if k not in skipped}
        trained["rows_a_step"] = self.rows_a_step
        if self._spec.data.streaming:
            trained["shuffle_buffer_size"] = self._spec.data.shuffle_buffer_size
        trained["sharded"] = self._spec.runtime.distributed == "fsdp2"
        return [self.fingerprint("prep", made), self._start, spec["model"], spec["lora"], trained]

    @cached_property
    def _pictures(self) -> list[str]:
        """Digests of the pictures that the sources' lists name."""
        named = self._spec.data.sources()
        return [pictures.digest(source, named[place]) for place, source in self.sources.items()]

    @cached_property
    def _start(self) -> list[Any]:
        """What the model is before training."""
        model = self._spec.model
        start: list[Any] = [self.model.digest, model.init, model.family, model.dtype]
        return [*start, self._spec.train.seed] if model.init == "random" else start

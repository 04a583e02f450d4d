"""The inputs of a job, located before any work is done, and the fingerprints of its stages.

Equal fingerprints mean equal results: a stage is skipped if its stored result has the current
fingerprint.
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

Stage = Literal["prep", "baseline", "train", "eval", "export", "card", "report", "push"]

MEASURED_STAGES: tuple[Stage, ...] = ("prep", "baseline", "train", "eval", "export")
"""The stages that the model cards and the report describe."""

PUSHED_STAGES: tuple[Stage, ...] = ("train", "export", "card")
"""The stages whose files are pushed to the hub."""

# Keys of the export section for the hub; they do not affect the exported files.
HUB_KEYS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_content")
# Keys of the train section that do not affect the trained weights.
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
# Keys of the data section that do not affect the prepared rows.
UNPREPARED_KEYS = ("num_proc", "shuffle_buffer_size")
# Keys that change how a step is computed, but not its result.
COMPUTING_KEYS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "group_by_length",
    "torch_compile",
)
# Keys for the length of a training; whether its schedule depends on them is in job.train.schedule.
LENGTH_KEYS = ("max_steps", "num_train_epochs")
_EVAL = "$.data.eval"


class StageInputs:
    """The model and the data of a spec, located on first use, and the stages' fingerprints.

    Properties raise InputError if an input is missing or access is denied.
    """

    def __init__(self, spec: JobSpec, processes: int) -> None:
        """`processes` is the number of processes that train together."""
        self._spec, self._processes = spec, processes

    @cached_property
    def model(self) -> model_source.ModelInput:
        return model_source.find_model(self._spec.model)

    @cached_property
    def sources(self) -> dict[str, DataSource]:
        """The sources that `data` names, by their path in the spec."""
        named = self._spec.data.sources()
        return {place: discovery.find_source(source, place) for place, source in named.items()}

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that no row's text may contain; read from the checkpoint's small files."""
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
    def rows_per_step(self) -> int:
        """The rows of one optimizer step, over all micro-batches and processes."""
        train = self._spec.train
        micro_batches = train.gradient_accumulation_steps * self._processes
        return train.per_device_train_batch_size * micro_batches

    def fingerprint(self, stage: Stage, completed: Mapping[str, StageRecord]) -> str:
        """A digest of the job's version and all inputs of the stage, which identifies its result.

        Those of the cards, the report and the push depend on `completed`, so they are final only
        once all stages before them are.
        """
        spec = asdict(self._spec)
        if stage == "prep":
            digests = [[source.digest for source in self.sources.values()], self._images]
            read = {k: v for k, v in spec["data"].items() if k not in UNPREPARED_KEYS}
            # The kind of answer determines which rows count as equal, in splits and leakage checks.
            answer, tokens = self._spec.eval.answer, self.control_tokens
            parts: list[Any] = [read, digests, self._spec.train.seed, tokens, answer]
        elif stage == "baseline":
            generation = self.model.generation_digest
            parts = [
                self.fingerprint("prep", completed),
                self._initial_model,
                generation,
                spec["eval"],
            ]
        elif stage == "train":
            parts = [
                *self._training_inputs(completed),
                *(spec["train"][key] for key in COMPUTING_KEYS),
            ]
        elif stage == "eval":
            parts = [
                self.fingerprint("train", completed),
                self.model.generation_digest,
                spec["eval"],
            ]
        elif stage in ("card", "report"):
            # The report shows when stages ran and for how long, so rerunning one changes it.
            runs = [
                (record.fingerprint, record.started)
                for record in completed.values()
                if record.name in MEASURED_STAGES
            ]
            parts = [runs, {k: v for k, v in spec.items() if k not in ("output", "runtime")}]
        elif stage == "push":
            pushed = [
                (record.name, [(file.path, file.sha256) for file in record.files])
                for record in completed.values()
                if record.name in PUSHED_STAGES
            ]
            parts = [pushed, {key: spec["export"][key] for key in HUB_KEYS}]
        else:  # the generation settings of servers are written beside the weights
            exported = {k: v for k, v in spec["export"].items() if k not in HUB_KEYS}
            parts = [self.fingerprint("train", completed), self.model.generation_digest, exported]
        return fingerprint(__version__, stage, parts)

    def checkpoint_identity(self) -> Identity:
        """What must be equal to resume a training: not how steps are computed, nor their number.

        So a training may resume on fewer GPUs, or be extended.
        """
        spec, trained = asdict(self._spec), self._training_settings
        sections = {
            "data": {k: v for k, v in spec["data"].items() if k not in UNPREPARED_KEYS},
            "model": spec["model"],
            "lora": spec["lora"],
            "train": {k: v for k, v in trained.items() if k not in LENGTH_KEYS},
        }
        parts = {f"{name}.{k}": v for name, section in sections.items() for k, v in section.items()}
        parts["the version of the job"] = __version__
        parts["the files of the model"] = self._initial_model
        parts["the images of the data"] = self._images
        for path, source in self.sources.items():
            parts[f"the files of {path.removeprefix('$.')}"] = source.digest
        return Identity(parts=parts)

    def _training_inputs(self, completed: Mapping[str, StageRecord]) -> list[Any]:
        """The inputs of a training, except how its steps are computed."""
        spec, prepared = asdict(self._spec), self.fingerprint("prep", completed)
        return [prepared, self._initial_model, spec["model"], spec["lora"], self._training_settings]

    @property
    def _training_settings(self) -> dict[str, Any]:
        """All settings other than those of model and LoRA that affect the trained weights."""
        skipped = (*UNTRAINED_KEYS, *COMPUTING_KEYS)
        trained = {k: v for k, v in asdict(self._spec)["train"].items() if k not in skipped}
        trained["rows_a_step"] = self.rows_per_step
        if self._spec.data.streaming:
            trained["shuffle_buffer_size"] = self._spec.data.shuffle_buffer_size
        trained["sharded"] = self._spec.runtime.distributed == "fsdp2"
        return trained

    @cached_property
    def _images(self) -> list[str]:
        """Digests of the images to which the sources' rows refer."""
        specs = self._spec.data.sources()
        return [image_identity.digest(source, specs[path]) for path, source in self.sources.items()]

    @cached_property
    def _initial_model(self) -> list[Any]:
        """The identity of the model before training."""
        model = self._spec.model
        start: list[Any] = [self.model.weights_digest, model.init, model.family, model.dtype]
        return [*start, self._spec.train.seed] if model.init == "random" else start

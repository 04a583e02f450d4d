"""The inputs of a job, located before any work is done, and the fingerprints of its stages.

Equal fingerprints mean equal results: a stage is skipped if its stored result has the current
fingerprint.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from job import __version__, families
from job.artifacts.records import StageRecord
from job.families import adapter_source, chat_template, model_source
from job.local.file_digests import FileDigests
from job.pipeline.former_defaults import AUTO_COUNTS_AS, lora_settings
from job.prep import discovery, image_identity
from job.prep.source_files import DataSource
from job.prep.splits import split_of_source
from job.spec.answer_kinds import LOSS
from job.spec.types import JobSpec
from job.storage.digests import fingerprint
from job.train.identity import Identity
from job.train.schedule import LENGTH_KEYS

if TYPE_CHECKING:
    from job.rewards.named import NamedReward

Stage = Literal[
    "prep", "baseline", "train", "reinforce", "eval", "export", "card", "report", "push"
]

MEASURED_STAGES: tuple[Stage, ...] = (
    "prep",
    "baseline",
    "train",
    "reinforce",
    "eval",
    "export",
)
"""The stages that the model cards and the report describe."""

PUSHED_STAGES: tuple[Stage, ...] = ("train", "reinforce", "export", "card")
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
    "gradient_checkpointing",
    "torch_compile",
    "cuda_graphs",
)
# Keys of the model section that have an effect only if the base is loaded in 4 bits.
FOUR_BIT_KEYS = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
# Keys that choose when to stop and what to keep, but do not affect the weights after a step.
SELECTING_KEYS = (
    "eval_strategy",
    "eval_steps",
    "predict_with_generate",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
)
# Keys of the reinforce section that affect neither its weights nor which of them are kept, or that
# the identity has under another name.
UNREINFORCED_KEYS = ("allow_code", "logging_steps", "save_steps", "metric_for_best_model")
# Its keys that select which step is kept, and do not affect how steps are compared.
REINFORCE_SELECTING_KEYS = ("eval_strategy", "eval_steps", "load_best_model_at_end")
# Keys that add a validation split. They do not change the rows to evaluate on.
VALIDATION_KEYS = ("validation", "validation_fraction")


class StageInputs:
    """The model and the data of a spec, located on first use, and the stages' fingerprints.

    Properties raise InputError if an input is missing or access is denied.
    """

    def __init__(self, spec: JobSpec, processes: int) -> None:
        """`processes` is the number of processes that train together."""
        self._spec, self._processes = spec, processes
        self._cache_dir = Path(spec.runtime.cache_dir).expanduser()
        self._local_digests = FileDigests(self._cache_dir)

    def trained_by_others(self, processes: int) -> "Iterator[StageInputs]":
        """The inputs if this many processes trained: with the model sharded as the spec says, then
        the other way. Inputs that are located already are not located again."""
        runtime = self._spec.runtime
        for distributed in (runtime.distributed, "ddp" if self._spec.shards_weights else "fsdp2"):
            other = copy.copy(self)
            other._processes = processes
            other._spec = replace(self._spec, runtime=replace(runtime, distributed=distributed))
            yield other

    @cached_property
    def model(self) -> model_source.ModelInput:
        return model_source.find_model(self._spec.model, self._local_digests)

    @cached_property
    def adapter(self) -> model_source.ModelInput | None:
        """The adapter that training continues from, if any."""
        uri = self._spec.model.adapter_name_or_path
        return None if uri is None else adapter_source.find_adapter(uri)

    @cached_property
    def sources(self) -> dict[str, DataSource]:
        """The sources that `data` names, by their path in the spec."""
        named = self._spec.data.sources()
        return {
            field: discovery.find_source(source, field, self._local_digests)
            for field, source in named.items()
        }

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that no row's text may contain; read from the checkpoint's small files."""
        return families.control_tokens(self.model.uri, self._headers, self._spec.model)

    @cached_property
    def _headers(self) -> Path:
        """The folder of the checkpoint's small files."""
        return model_source.fetch_headers(self.model, self._cache_dir)

    @cached_property
    def chat_template(self) -> str | None:
        """The text of the spec's chat template. Raises SpecError if it cannot be used."""
        return chat_template.text_of(self._spec.model)

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        return tuple(s for path, s in self.sources.items() if split_of_source(path) == "train")

    @property
    def eval_source(self) -> DataSource | None:
        return self.sources.get("$.data.eval")

    @property
    def validation_source(self) -> DataSource | None:
        return self.sources.get("$.data.validation")

    @property
    def rows_per_step(self) -> int:
        """The rows of one optimizer step, over all micro-batches and processes."""
        return self._spec.train.rows_a_step * self._processes

    def fingerprint(self, stage: Stage, completed: Mapping[str, StageRecord]) -> str:
        """A digest of the job's version and all inputs of the stage, which identifies its result.

        Those of the cards, the report and the push depend on `completed`, so they are final only
        once all stages before them are.
        """
        if stage == "prep":
            return self._prepared_rows(validation=True)
        return fingerprint(__version__, stage, self._parts(stage, completed))

    def _parts(self, stage: Stage, completed: Mapping[str, StageRecord]) -> list[Any]:
        """The inputs of a stage after prep."""
        match stage:
            case "baseline":
                generation = self.model.generation_digest
                rows = self._prepared_rows(validation=False)
                return [rows, self._initial_model, generation, self._evaluating]
            case "train":
                computing = (self._computing[key] for key in COMPUTING_KEYS)
                return [*self._training_inputs(completed), *computing, self._selecting]
            case "reinforce":
                return [self.fingerprint("train", completed), self._reinforcing]
            case "eval":
                trained = self.fingerprint(self.trained_by, completed)
                return [trained, self.model.generation_digest, self._evaluating]
            case "export":  # servers' generation settings are written beside the weights
                trained = self.fingerprint(self.trained_by, completed)
                return [trained, self.model.generation_digest, self._exporting]
            case "card" | "report":
                # The report shows when stages ran and for how long, so rerunning one changes it.
                runs = [
                    (record.fingerprint, record.started)
                    for record in completed.values()
                    if record.name in MEASURED_STAGES
                ]
                return [runs, self._described]
            case "push":
                pushed = [
                    (record.name, [(file.path, file.sha256) for file in record.files])
                    for record in completed.values()
                    if record.name in PUSHED_STAGES
                ]
                return [pushed, {key: getattr(self._spec.export, key) for key in HUB_KEYS}]
        raise AssertionError(f"{stage} has a fingerprint of its own")

    def checkpoint_identity(self) -> Identity:
        """What must be equal to resume a training: not how steps are computed, nor their number.

        So a training may resume on fewer GPUs, or be extended.
        """
        trained = self._training_settings
        sections = {
            "data": self._preparing(validation=True),
            "model": self._model_settings,
            "lora": self._lora_settings,
            "train": {k: v for k, v in trained.items() if k not in LENGTH_KEYS["train"]},
        }
        parts = {f"{name}.{k}": v for name, section in sections.items() for k, v in section.items()}
        parts |= {f"the validation's {k}": v for k, v in self._comparing.items()}
        parts["the version of the job"] = __version__
        parts["the files of the model"] = self._initial_model
        parts["the images of the data"] = list(self._images.values())
        for path, source in self.sources.items():
            parts[f"the files of {path.removeprefix('$.')}"] = source.digest
        return Identity(parts=parts)

    @cached_property
    def rewards(self) -> "tuple[NamedReward, ...]":
        """The rewards of reinforcement. Raises SpecError or InputError for code of the user's that
        cannot be used."""
        from job.rewards.named import rewards_of

        own = self._spec.reinforce
        return () if own is None else rewards_of(own.rewards, allow_code=own.allow_code)

    @property
    def trained_by(self) -> Stage:
        """The stage whose weights are evaluated and exported."""
        return "train" if self._spec.reinforce is None else "reinforce"

    def reinforcement_identity(self, completed: Mapping[str, StageRecord]) -> Identity:
        """What must be equal to resume reinforcement: not how many steps it takes."""
        skipped = (*UNREINFORCED_KEYS, *REINFORCE_SELECTING_KEYS, *LENGTH_KEYS["reinforce"])
        own = {k: v for k, v in self._reinforcing.items() if k not in skipped}
        parts = {f"reinforce.{key}": value for key, value in own.items()}
        parts["the adapter that train made"] = self.fingerprint("train", completed)
        parts["the version of the job"] = __version__
        return Identity(parts=parts)

    @property
    def _reinforcing(self) -> dict[str, Any]:
        """The settings that the reinforced adapter depends on."""
        own = self._spec.reinforce
        assert own is not None
        settings: dict[str, Any] = {
            key: value for key, value in asdict(own).items() if key not in UNREINFORCED_KEYS
        }
        settings["the code of rewards"] = [each.digest for each in self.rewards]
        settings["max_length"] = self._spec.train.max_length
        settings["seed"] = self._spec.train.seed
        settings["answer"] = self._spec.eval.answer
        if own.eval_strategy == "no":
            return {k: v for k, v in settings.items() if k not in REINFORCE_SELECTING_KEYS}
        settings["eval_steps"] = own.eval_steps or own.save_steps
        settings["metric"] = self._spec.reinforcement_metric
        settings["validation_samples"] = self._spec.eval.validation_samples
        return {**settings, **self._answering}

    def _training_inputs(self, completed: Mapping[str, StageRecord]) -> list[Any]:
        """The inputs of a training, except how its steps are computed."""
        prepared, trained = self.fingerprint("prep", completed), self._training_settings
        return [prepared, self._initial_model, self._model_settings, self._lora_settings, trained]

    @cached_property
    def _lora_settings(self) -> dict[str, Any]:
        family = families.of_checkpoint(self.model.uri, self._headers, self._spec.model)
        return lora_settings(self._spec.lora, family)

    @property
    def _model_settings(self) -> dict[str, Any]:
        """The model section, with the digest of a chat template instead of its path or text."""
        text = self.chat_template
        return {
            **self._model_keys,
            "chat_template": None if text is None else fingerprint(text),
        }

    @property
    def _model_keys(self) -> dict[str, Any]:
        """The model section, without keys that have no effect."""
        model = self._spec.model
        skipped = () if model.load_in_4bit else FOUR_BIT_KEYS
        return {key: value for key, value in asdict(model).items() if key not in skipped}

    @property
    def _training_settings(self) -> dict[str, Any]:
        """All settings other than those of model and LoRA that affect the trained weights."""
        skipped = (*UNTRAINED_KEYS, *COMPUTING_KEYS, *SELECTING_KEYS, "metric_for_best_model")
        trained = {k: v for k, v in asdict(self._spec)["train"].items() if k not in skipped}
        trained["rows_a_step"] = self.rows_per_step
        if self._spec.data.streaming:
            trained["shuffle_buffer_size"] = self._spec.data.shuffle_buffer_size
        trained["sharded"] = self._spec.shards_weights
        return trained

    @property
    def _computing(self) -> dict[str, Any]:
        """The settings of how a step is computed."""
        given = {key: getattr(self._spec.train, key) for key in COMPUTING_KEYS}
        return {k: AUTO_COUNTS_AS[k] if v == "auto" else v for k, v in given.items()}

    @property
    def _selecting(self) -> dict[str, Any]:
        """What a training's result depends on in addition to its settings: validations, when it
        stops, and which step it keeps. Empty without validation."""
        train = self._spec.train
        if not train.validates:
            return {}
        keys = {key: getattr(train, key) for key in SELECTING_KEYS}
        answers = self._answering if train.generates_answers else {}
        return {**keys, "eval_steps": train.validation_steps, **self._comparing, **answers}

    @property
    def _comparing(self) -> dict[str, Any]:
        """What the compared values of validations depend on, other than the model and the data: if
        it changes, earlier values cannot be compared with later ones. Empty without validation."""
        train = self._spec.train
        if not train.validates:
            return {}
        answers = self._answering if train.best_metric != LOSS else {}
        samples = self._spec.eval.validation_samples
        return {"metric": train.best_metric, "validation_samples": samples, **answers}

    @property
    def _answering(self) -> dict[str, Any]:
        """The settings of generated answers and their metrics."""
        evaluation = asdict(self._spec)["eval"]
        return {key: evaluation[key] for key in ("answer", "turns", "metrics", "generation")}

    def _prepared_rows(self, *, validation: bool) -> str:
        """The fingerprint of prep, or, without `validation`, of its rows to evaluate on: adding a
        validation split does not change these."""
        paths = [p for p in self.sources if validation or split_of_source(p) != "validation"]
        digests = [[self.sources[p].digest for p in paths], [self._images[p] for p in paths]]
        read = self._preparing(validation=validation)
        # The kind of answer determines which rows count as equal, in splits and leakage checks.
        answer, tokens = self._spec.eval.answer, self.control_tokens
        parts = [read, digests, self._spec.train.seed, tokens, answer]
        return fingerprint(__version__, "prep", parts)

    def _preparing(self, *, validation: bool) -> dict[str, Any]:
        """The settings that the prepared rows depend on."""
        skipped = {*UNPREPARED_KEYS}
        if not (validation and self._spec.data.has_validation):
            skipped |= {*VALIDATION_KEYS}
        return {k: v for k, v in asdict(self._spec)["data"].items() if k not in skipped}

    @property
    def _evaluating(self) -> dict[str, Any]:
        """The settings of the evaluations before and after training."""
        return {k: v for k, v in asdict(self._spec)["eval"].items() if k != "validation_samples"}

    @property
    def _exporting(self) -> dict[str, Any]:
        """The settings of the exported files."""
        return {k: v for k, v in asdict(self._spec)["export"].items() if k not in HUB_KEYS}

    @property
    def _described(self) -> dict[str, Any]:
        """The settings that the model cards and the report show."""
        shown = {k: v for k, v in asdict(self._spec).items() if k not in ("output", "runtime")}
        if self._spec.reinforce is None:  # specs of earlier versions had no such section
            del shown["reinforce"]
        return {**shown, "model": self._model_keys, "lora": self._lora_settings}

    @cached_property
    def _images(self) -> dict[str, str]:
        """Digests of the images to which the rows of each source refer, by its path in the spec."""
        specs = self._spec.data.sources()
        return {
            path: image_identity.digest(source, specs[path])
            for path, source in self.sources.items()
        }

    @cached_property
    def _initial_model(self) -> list[Any]:
        """The identity of the model before training: the base, and the adapter if any."""
        model = self._spec.model
        start: list[Any] = [self.model.weights_digest, model.init, model.family, model.dtype]
        if (template := self.chat_template) is not None:
            start.append(fingerprint(template))
        if model.load_in_4bit:
            start.append([self._model_keys[key] for key in FOUR_BIT_KEYS])
        if self.adapter is not None:
            start.append(self.adapter.digest)
        return [*start, self._spec.train.seed] if model.init == "random" else start

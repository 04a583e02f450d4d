"""The state that the stages of a run share: inputs, output, prepared data, engine and models.

Everything is created on first use: no model is loaded unless a stage needs it.
"""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from job import __version__, engines, families, log, telemetry
from job.artifacts.output import Output
from job.artifacts.records import RunRecord, StageRecord
from job.distributed.coordinator import Coordinator
from job.engines import ways
from job.engines.device import Accelerator, require_four_bit, resolve_dtype
from job.engines.ways import Ways
from job.errors import JobError
from job.families import model_source
from job.local import daemon_threads, eviction
from job.local.process_identity import utc_now
from job.local.work_folder import WorkFolder
from job.pipeline.fingerprints import Stage, StageInputs
from job.prep import cache
from job.prep.prepared_data import PreparedData
from job.prep.streaming import FullShards
from job.spec.load import LoadedSpec
from job.spec.output_folders import ADAPTER, REINFORCED, WEIGHTS
from job.train.identity import Identity

REINFORCE = "reinforce"
"""The folder among the checkpoints that has those of the stage `reinforce`."""

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from job.engines.models import Models
    from job.engines.stored_adapter import StoredAdapter
    from job.train.checkpoint.storage import CheckpointStore


class RunContext:
    """The state of a run in this process; `coordinator` is None if there is only one process.

    `processes` is how many a plan is for.
    """

    def __init__(
        self,
        loaded: LoadedSpec,
        command: str,
        coordinator: Coordinator | None = None,
        *,
        processes: int = 1,
    ) -> None:
        self.loaded, self.spec = loaded, loaded.spec
        self.command, self.coordinator = command, coordinator
        self.record = RunRecord(
            name=self.spec.name, command=command, status="running", started=utc_now()
        )
        self.status = telemetry.Status(self.spec.name, __version__)
        self.work = self._work_folder()
        self.output = Output(uri=self.spec.output.uri, workdir=self.work, run=self.record)
        self.processes = processes if coordinator is None else coordinator.world.size
        self.inputs = StageInputs(self.spec, processes=self.processes)
        self.engine_name: engines.EngineName = "transformers"
        self._end_trials: Callable[[], Ways] | None = None
        self._model_check: Future[None] | None = None

    def _work_folder(self) -> WorkFolder:
        runtime = self.spec.runtime
        root, field = self.cache_dir / "work", "$.runtime.cache_dir"
        if runtime.workdir is not None:
            root, field = Path(runtime.workdir).expanduser(), "$.runtime.workdir"
        node = self.coordinator.world.node if self.coordinator is not None else 0
        return WorkFolder(root, self.spec.name, self.spec.output.uri, node=node, field=field)

    @property
    def cache_dir(self) -> Path:
        return Path(self.spec.runtime.cache_dir).expanduser()

    @property
    def cache_limit(self) -> int:
        """The maximum size of the caches in bytes; zero for no limit."""
        return eviction.parse_size(self.spec.runtime.cache_limit)

    def fingerprint(self, stage: Stage) -> str:
        return self.inputs.fingerprint(stage, self.record.stages)

    def keep_trained(self) -> None:
        """Keeps a complete training of this spec that other processes made.

        Another number of them took other rows a step, and they may have sharded the model; but the
        result is what the spec asks for: one process that evaluates or exports it must not replace
        it by a training of its own. From then on, fingerprints are those of its processes.
        """
        completed, trained = self.output.stages.completed, self.record.stages
        record = self.output.stages.markers.read("train")
        made_by = record.summary.get("processes") if record is not None else None
        if record is None or not isinstance(made_by, int):
            return
        if record.fingerprint == self.fingerprint("train"):
            return
        for others in self.inputs.trained_by_others(made_by):
            if completed("train", others.fingerprint("train", trained), quiet=True) is not None:
                log.info(
                    "the training is kept, though other processes made it",
                    made_by=made_by,
                    now=self.processes,
                    to_train_again="use another output",
                )
                self.inputs = others
                return

    def start_hashing(self) -> None:
        """Starts to hash a local model, which takes seconds, beside the start of the run.

        One that cannot be found is reported by its first use.
        """
        if model_source.is_local(self.spec.model.model_name_or_path):
            with suppress(JobError):
                self.inputs.model.start_hashing()

    # --- prepared data -----------------------------------------------------------------------

    @cached_property
    def data(self) -> PreparedData:
        prep = self.record.stages["prep"]
        directory, rows = self.fetch_rows(prep) / "data", prep.summary["rows"]
        return PreparedData(
            directory=directory,
            train_rows=rows["train"],
            eval_rows=rows["eval"],
            rejected_rows=rows["rejected"],
            leaked_rows=rows["leaked"],
            validation_rows=rows.get("validation"),
            leaked_validation_rows=rows.get("leaked_validation", 0),
            full_shards=self._full_shards(directory) if self.spec.data.streaming else None,
        )

    def fetch_rows(self, prep: StageRecord) -> Path:
        """The folder of prep's files, from the cache if possible, else from the output."""
        local = self.output.stages.local
        if not (local.path("prep") / "data").exists():
            prepared = self.cache_dir / eviction.PREPARED
            cache.restore(prepared, prep.fingerprint, local.path("prep") / "data")
        return local.fetch(prep)

    def _full_shards(self, directory: Path) -> FullShards:
        """Streamed training images, which prep does not store; removes those of other data."""
        folder = self.output.workdir / "pictures"
        identity = self.record.stages["prep"].fingerprint[:16]
        for old in folder.glob("*"):
            if old.name != identity:
                shutil.rmtree(old, ignore_errors=True)
        sources = self.inputs.train_sources
        return FullShards.of(self.spec.data, sources, directory, folder / identity)

    # --- engine ------------------------------------------------------------------------------

    @cached_property
    def accelerator(self) -> Accelerator:
        from job.engines.device import detect

        local_rank = 0 if self.coordinator is None else self.coordinator.world.local_rank
        return detect(self.spec.runtime, local_rank)

    def begin_model_check(self, check: Callable[[], None]) -> None:
        """Begins to check the spec against the model's architecture, while rows are prepared.

        It imports Transformers' models, which takes seconds. Two threads must not import the same
        library at once: modules of an import cycle may fail, and Transformers' packages replace
        themselves when they are loaded, so that the other thread would keep an empty one. So what
        prep uses of libraries is imported before.
        """
        import datasets  # noqa: F401 - with pandas, pyarrow and huggingface_hub
        import PIL.Image  # noqa: F401
        from transformers import PreTrainedTokenizerBase  # noqa: F401 - which datasets asks for

        self._model_check = daemon_threads.start(check, name="model check")

    def require_checked_model(self, *, wait: bool = True) -> None:
        """Raises what the check has raised; without `wait`, only if it has ended."""
        if self._model_check is not None and (wait or self._model_check.done()):
            self._model_check.result()

    def begin_trials(self) -> None:
        """Begins to try the ways to compute of a training to come, while rows are prepared.

        If one is complete, what the other stages use is tried once they load a model, if any does.
        """
        if self.accelerator.kind == "cpu" or self.output.holds_finished_run:
            return
        if not self.output.stages.markers.exists("train"):
            names = self._wanted_ways(trains=True)
            self._end_trials = ways.begin(self.accelerator, self.cache_dir, names)

    @cached_property
    def ways(self) -> Ways:
        """The ways to compute that serve on this device; waits for their trials."""
        if self._end_trials is not None:
            return self._end_trials()
        follows = self.coordinator is not None and self.coordinator.world.rank > 0
        return ways.find(self.accelerator, self.cache_dir, self._wanted_ways(trains=follows))

    @cached_property
    def training_ways(self) -> Ways:
        """Those of a training too; tries what was not tried yet."""
        known = {outcome.way for outcome in self.ways.outcomes}
        missing = [name for name in self._wanted_ways(trains=True) if name not in known]
        if not missing:
            return self.ways
        found = ways.find(self.accelerator, self.cache_dir, missing)
        return Ways((*self.ways.outcomes, *found.outcomes))

    def _wanted_ways(self, *, trains: bool) -> Sequence[str]:
        from job.pipeline.wanted_ways import wanted

        spec, export = self.spec, self.spec.export
        dtypes = {str(resolve_dtype(spec.model, spec.lora, self.accelerator))[6:]}
        if export.merged.enabled and self.command in ("run", "export"):
            dtypes.add(export.merged.dtype)  # in which the export is verified
        patches_forward = self.engine_name == "unsloth"
        return wanted(spec, dtypes=dtypes, trains=trains, patches_forward=patches_forward)

    @cached_property
    def engine(self) -> engines.Engine:
        # Tried before the first model takes memory, and asks which way to compute.
        obstacle = self.ways.obstacle(ways.FOUR_BIT)
        if self.accelerator.kind == "cpu":  # where it is not tried
            obstacle = None
        require_four_bit(self.spec.model, obstacle)
        model = replace(self.spec.model, engine=self.engine_name)
        return engines.create(model, self.spec.lora, self.accelerator)

    def choose_engine(self) -> None:
        """Chooses the engine for training; until then, and in other commands, it is Transformers.

        Must be called before Transformers is imported, because Unsloth patches it. Raises SpecError
        if the spec names an engine that cannot train it here.
        """
        from job.engines import unsloth_patches

        family = self._family_name() if self.spec.model.engine != "transformers" else None
        choice = engines.choose(self.spec, family, self.accelerator, processes=self.processes)
        log.info("engine", takes=choice.engine, reason=choice.reason)
        if choice.engine == "unsloth":
            compiled = self.spec.train.torch_compile is True
            unsloth_patches.import_unsloth(self.work.path, compiled=compiled)
        self.engine_name = choice.engine

    def _family_name(self) -> str | None:
        """The family's name; None if the model cannot be read, which loading it will report."""
        with suppress(JobError):
            return families.resolve(self.spec.model)[0].name
        return None

    # --- models ------------------------------------------------------------------------------

    @cached_property
    def family(self) -> families.Family:
        directory = model_source.fetch_model(self.inputs.model, self.cache_dir, self.cache_limit)
        return self.bind(directory, self.inputs.model.uri)

    def bind_headers(self) -> families.Family:
        """The family with its tokenizer and chat template, without the weights."""
        directory = model_source.fetch_headers(self.inputs.model, self.cache_dir, self.cache_limit)
        return self.bind(directory, self.inputs.model.uri)

    def bind(self, directory: Path, uri: str | None = None) -> families.Family:
        """The family of the checkpoint in `directory`."""
        checkpoint = families.read_checkpoint(uri or str(directory), directory)
        # The text that the fingerprints cover, whatever becomes of its file during the run.
        model = replace(self.spec.model, chat_template=self.inputs.chat_template)
        return families.bind(checkpoint, model, self.spec.data)

    @cached_property
    def models(self) -> "Models":
        from job.engines.models import Models

        return Models(self.spec, self.engine, self.family)

    @cached_property
    def start_adapter(self) -> "StoredAdapter | None":
        """The adapter that training continues from, downloaded and compared with the model."""
        found = self.inputs.adapter
        if found is None:
            return None
        return self.read_adapter(found, "training continues from the adapter")

    def read_adapter(self, found: model_source.ModelInput, event: str) -> "StoredAdapter":
        """Downloads an adapter and compares it with the model's architecture.

        Raises InputError if it does not fit; the log names it with `event`.
        """
        from job.engines.adapter_fit import warn_of_other_base
        from job.engines.stored_adapter import read_adapter

        directory = model_source.fetch_model(found, self.cache_dir, self.cache_limit)
        _, skeleton = families.architecture(self.spec.model)
        stored = read_adapter(found.uri, directory, skeleton)
        warn_of_other_base(stored, self.spec.model)
        log.info(event, adapter=stored.uri, tensors=len(stored.renamed), names=stored.naming)
        return stored

    def initial_model(self) -> "PreTrainedModel | PeftModel":
        """The model that training starts from: the base, or the base with the adapter."""
        return self.models.initial(self.start_adapter)

    def trained_model(self) -> "PreTrainedModel | PeftModel":
        model: PreTrainedModel | PeftModel
        model = self.models.trained(self.adapter_path(), self._family_of_weights)
        return model

    def adapter_path(self) -> Path | None:
        """The trained adapter; None after full fine-tuning."""
        if self.spec.lora.method == "full":
            return None
        folder = self.output.stages.local.fetch(self.record.stages[self.inputs.trained_by])
        return folder / f"{self.trained_folder}{ADAPTER}"

    @property
    def trained_folder(self) -> str:
        """The folder of the trained adapter at the output, with a slash; empty for the top."""
        return "" if self.inputs.trained_by == "train" else f"{REINFORCED}/"

    def _family_of_weights(self) -> families.Family:
        train = self.output.stages.local.fetch(self.record.stages["train"])
        return self.bind(train / WEIGHTS)

    def sft_adapter(self) -> "StoredAdapter":
        """The adapter that the stage `train` made, which reinforcement continues."""
        from job.engines.stored_adapter import read_adapter

        folder = self.output.stages.local.fetch(self.record.stages["train"]) / ADAPTER
        _, skeleton = families.architecture(self.spec.model)
        return read_adapter(self.output.at(ADAPTER), folder, skeleton)

    def reinforcement_checkpoints(self) -> "CheckpointStore":
        """The checkpoints of the stage `reinforce`."""
        from job.train.checkpoint.storage import CheckpointStore

        identity = self.inputs.reinforcement_identity(self.record.stages)
        folder = f"checkpoints/{REINFORCE}"
        return CheckpointStore(
            uri=self.output.at(folder),
            fingerprint=identity.fingerprint,
            parts=identity.to_json(),
            writer=self.output.writer.inside(folder),
        )

    def checkpoints(self, identity: Identity | None) -> "CheckpointStore":
        from job.train.checkpoint.storage import CheckpointStore

        return CheckpointStore(
            uri=self.output.at("checkpoints"),
            fingerprint=identity.fingerprint if identity else "",
            parts=identity.to_json() if identity else {},
            writer=self.output.writer.inside("checkpoints"),
        )

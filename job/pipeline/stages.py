"""What each stage does, and what stages are made from: the spec, its inputs, models, the output.

A stage fills a folder and returns its summary; `job.pipeline.runner` decides which stages run and
what becomes of their files. Models are loaded when the first stage that runs needs one.
"""

import functools
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from job import __version__, engines, families, log, telemetry
from job.artifacts.output import Output, utc_now
from job.artifacts.records import RunRecord, StageRecord
from job.distributed.coordinator import Coordinator
from job.errors import DataError, InputError, JobError
from job.evaluation.answer_kinds import FORMS
from job.families import model_source
from job.local import eviction
from job.local.work_folder import WorkFolder
from job.pipeline.fingerprints import Stage, StageInputs
from job.prep import cache
from job.prep.prepare import STATS, PreparedData, prepare
from job.prep.streaming import Pictures
from job.spec.load import LoadedSpec
from job.spec.rules.locations import LOGS
from job.train.identity import Identity

if TYPE_CHECKING:
    from job.train.checkpoint.storage import CheckpointStore
    from job.train.train import TrainResult


class Stages:
    """The stages of one spec, for rank 0 or, with `coordinator`, for a process beside it."""

    def __init__(
        self, loaded: LoadedSpec, command: str, coordinator: Coordinator | None = None
    ) -> None:
        self.loaded, self.coordinator = loaded, coordinator
        self.spec = loaded.spec
        self.record = RunRecord(
            name=self.spec.name, command=command, status="running", started=utc_now()
        )
        self.status = telemetry.Status(self.spec.name, __version__)
        self.work = self._work_folder()
        self.output = Output(uri=self.spec.output.uri, workdir=self.work, run=self.record)
        self.processes = 1 if coordinator is None else coordinator.world.size
        self.given = StageInputs(self.spec, processes=self.processes)
        self.trained_by: engines.Name = "transformers"
        self._writable = False

    # --- the stages ------------------------------------------------------------------------

    def prep(self, directory: Path) -> dict[str, Any]:
        identity, kept = self.fingerprint("prep"), self.cache_dir / eviction.PREPARED
        rows = cache.take(kept, identity, directory / "data")
        if rows is not None:
            log.info("the same rows were prepared before, and are used again", kept=kept)
        else:
            data = prepare(
                self.spec.data,
                self.given.train_sources,
                self.given.eval_source,
                directory / "data",
                seed=self.spec.train.seed,
                label_key=FORMS[self.spec.eval.answer],
                classes=self.spec.eval.answer == "label",
                identity=identity,
                control_tokens=self.given.control_tokens,
            )
            rows = {
                "train": data.train_rows,
                "eval": data.eval_rows,
                "rejected": data.rejected_rows,
                "leaked": data.leaked_rows,
            }
            cache.keep(kept, identity, directory / "data", rows)
            if self.cache_limit:
                eviction.make_room(self.cache_dir, self.cache_limit, keep=kept / identity[:32])
        log.info("data", **rows)
        self._require_images(families.expected(self.spec.model), directory / "data")
        return {"rows": rows}

    def _require_images(self, family: type[families.Family] | None, prepared: Path) -> None:
        """Raises DataError if no row to train has an image that the model could read."""
        if family is None or not family.reads_images or self.spec.data.text_only:
            return
        statistics = json.loads((prepared / STATS).read_text(encoding="utf-8"))
        if not statistics["train"]["images"]:
            raise DataError(
                "$.data.train",
                f"none of the {statistics['train']['rows']} rows to train has an image, and the "
                "model reads images",
                value=self.spec.model.model_name_or_path,
                fix="name the column of the images, columns: {image: NAME}; or set "
                "data.text_only: true if the rows are meant to have none",
            )

    def baseline(self, directory: Path) -> dict[str, Any]:
        self._require_images(type(self.family), self.data.directory)
        self._require_writable()
        return self._evaluate(self.models.base(), directory, "baseline", "baseline.predictions")

    def train(self, directory: Path) -> dict[str, Any]:
        self._require_images(type(self.family), self.data.directory)
        self._require_writable()
        identity = self.given.identity_of_checkpoints()
        if self.coordinator is not None:
            # Fetched before the others look: on this machine they find it all there.
            self.models.base()
            prep = self.record.stages["prep"]
            self._fetch_rows(prep)
            self.coordinator.tell("train", {"prep": prep.to_json(), "work": str(self.work.path)})
        model, result = self.fit(directory, identity)
        assert result is not None
        if model is None:  # it was trained in shares
            self.models.release()
        else:
            self.models.keep_trained(model)
        log.info(
            "trained",
            step=result.steps,
            first_loss=result.first_loss,
            loss=result.final_loss,
            took=log.span(result.seconds),
            tokens_per_second=result.tokens_per_second,
            peak_memory=log.amount(result.peak_memory_bytes),
            memory=log.amount(self.accelerator.memory_bytes),
        )
        return result.to_json()

    def fit(
        self, directory: Path, identity: Identity | None = None
    ) -> "tuple[Any, TrainResult | None]":
        """The training itself, which every process takes part in; rank 0 gets the result.

        The others have no `identity` to give: rank 0 chooses the checkpoint and stores them.
        """
        from job.distributed import process_group
        from job.train.trackers import TrackerFiles
        from job.train.train import train

        logs = self.spec.train.logging_dir or self.output.at(LOGS)
        with process_group.formed(self.coordinator, self.accelerator.kind):
            return train(
                self.spec,
                self.engine,
                self.accelerator,
                self.family,
                self.models.base(),
                self.data,
                directory,
                self.output.workdir / "trainer",
                self.checkpoints(identity),
                publish=functools.partial(self.output.publish_file, "train"),
                require=self.output.require,
                tell=self.status.tell,
                trackers=TrackerFiles(
                    self.spec.train.report_to,
                    self.output.workdir / "logs",
                    logs,
                    self.output.uploads_to(logs),
                ),
            )

    def eval(self, directory: Path) -> dict[str, Any]:
        return self._evaluate(self._trained_model(), directory, "final", "predictions")

    def export(self, directory: Path) -> dict[str, Any]:
        from job.export.context import ExportContext
        from job.export.export import export

        if not self.spec.export.merged.enabled:
            return {"merged": False}
        context = ExportContext(
            spec=self.spec,
            engine=self.engine,
            family=self.family,
            rows=self.data.rows("eval"),
            adapter=self._adapter_path(),
            directory=directory,
            load_trained=self._trained_model,
            load_base=self.models.base,
            release=self.models.release,
            bind_merged=self.bind,
            on_shard_written=functools.partial(self.output.send, "export"),
        )
        return export(context).to_json()

    def report(self, directory: Path) -> dict[str, Any]:
        from job.evaluation import report

        page = report.render(
            report.RunResults(
                name=self.spec.name,
                settings=self.loaded.resolved,
                changed=self.loaded.changed,
                stages=self.record.stages,
                inputs=self.record.inputs,
                versions=self.record.versions,
                history=self._lines("train", "train/history.jsonl"),
                before=self._lines("baseline", "eval/baseline.predictions.jsonl"),
                after=self._lines("eval", "eval/predictions.jsonl"),
                rows=self.data.rows("eval"),
                rejects=self._lines("prep", "data/rejects.jsonl"),
                statistics=self._figures("prep", "data/stats.json"),
                lengths=self._figures("train", "train/lengths.json"),
            )
        )
        (directory / report.REPORT).write_text(page, encoding="utf-8")
        return {"bytes": len(page.encode())}

    def _lines(self, stage: Stage, path: str) -> list[dict[str, Any]]:
        """The JSON objects of a finished stage's file, one a line; none without the stage."""
        if stage not in self.record.stages:
            return []
        file = self.output.fetch_file(self.record.stages[stage], path)
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def _figures(self, stage: Stage, path: str) -> dict[str, Any]:
        """The JSON object that a finished stage left."""
        found: dict[str, Any]
        file = self.output.fetch_file(self.record.stages[stage], path)
        found = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _require_writable(self) -> None:
        """Writes all of the export but weights, and throws it away: what the base's own files do
        not allow must not show after the training.
        """
        import torch

        merged = self.spec.export.merged
        if self._writable or (not merged.enabled and self.spec.lora.method == "lora"):
            return
        with TemporaryDirectory() as folder:
            try:
                dtype = getattr(torch, merged.dtype)
                self.family.save_settings(Path(folder), dtype=dtype, layout=merged.layout)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise InputError(
                    self.given.model.uri,
                    "its configuration, processor or tokenizer cannot be written for an export: "
                    f"{type(error).__name__}: {error}",
                    fix="correct the small files of the checkpoint",
                ) from error
        self._writable = True

    def _evaluate(self, model: Any, directory: Path, name: str, file: str) -> dict[str, Any]:
        import torch

        from job.evaluation.evaluate import evaluate, write

        # Sampled answers depend on nothing that this process has done before, such as training.
        torch.manual_seed(0)
        evaluation = evaluate(
            model,
            self.family,
            self.data.rows("eval"),
            self.spec.eval,
            batch_size=self.spec.train.per_device_eval_batch_size,
            label=f"evaluate {name}",
        )
        write(evaluation, directory, name, f"{file}.jsonl")
        summary = evaluation.summary()
        log.info(
            name,
            **evaluation.metrics,
            turns=evaluation.turns,
            cut_short=log.of(summary["cut_short"], summary["answers"]),
        )
        return summary

    # --- what stages are made from ---------------------------------------------------------

    def fingerprint(self, stage: Stage) -> str:
        return self.given.fingerprint(stage, self.record.stages)

    @property
    def cache_dir(self) -> Path:
        return Path(self.spec.runtime.cache_dir).expanduser()

    @property
    def cache_limit(self) -> int:
        """What the caches may take, in bytes; zero for no limit."""
        return eviction.in_bytes(self.spec.runtime.cache_limit)

    def _work_folder(self) -> WorkFolder:
        runtime = self.spec.runtime
        root, field = self.cache_dir / "work", "$.runtime.cache_dir"
        if runtime.workdir is not None:
            root, field = Path(runtime.workdir).expanduser(), "$.runtime.workdir"
        node = self.coordinator.world.node if self.coordinator is not None else 0
        return WorkFolder(root, self.spec.name, self.spec.output.uri, node=node, field=field)

    @cached_property
    def data(self) -> PreparedData:
        prep = self.record.stages["prep"]
        directory, rows = self._fetch_rows(prep) / "data", prep.summary["rows"]
        return PreparedData(
            directory=directory,
            train_rows=rows["train"],
            eval_rows=rows["eval"],
            rejected_rows=rows["rejected"],
            leaked_rows=rows["leaked"],
            pictures=self._pictures(directory) if self.spec.data.streaming else None,
        )

    def _fetch_rows(self, prep: StageRecord) -> Path:
        """What prep left; from the cache rather than from the output where that has the same."""
        place = self.work / "stages" / "prep" / "data"
        if not place.exists():
            cache.take(self.cache_dir / eviction.PREPARED, prep.fingerprint, place)
        return self.output.fetch(prep)

    def _pictures(self, directory: Path) -> Pictures:
        place = self.output.workdir / "pictures"
        identity = self.record.stages["prep"].fingerprint[:16]
        for old in place.glob("*"):
            if old.name != identity:
                shutil.rmtree(old, ignore_errors=True)
        sources = self.given.train_sources
        return Pictures.of(self.spec.data, sources, directory, place / identity)

    def checkpoints(self, identity: Identity | None) -> "CheckpointStore":
        from job.train.checkpoint.storage import CheckpointStore

        return CheckpointStore(
            uri=self.output.at("checkpoints"),
            fingerprint=identity.fingerprint if identity else "",
            parts=identity.to_json() if identity else {},
            writer=self.output.writer.inside("checkpoints"),
        )

    @cached_property
    def accelerator(self) -> Any:
        from job.engines.device import detect

        return detect(
            self.spec.runtime, self.coordinator.world.local_rank if self.coordinator else 0
        )

    @cached_property
    def engine(self) -> Any:
        model = replace(self.spec.model, engine=self.trained_by)
        return engines.create(model, self.spec.lora, self.accelerator)

    def choose_engine(self) -> None:
        """Says which engine trains; until it is called, and in a command that trains nothing, it is
        the plain one.

        Before anything of Transformers is imported, which Unsloth patches. Raises SpecError where
        the spec names an engine that cannot train it here.
        """
        from job.engines import unsloth_patches

        family = self._family_name() if self.spec.model.engine != "transformers" else None
        choice = engines.choose(self.spec, family, self.accelerator, processes=self.processes)
        log.info("engine", takes=choice.engine, reason=choice.reason)
        if choice.engine == "unsloth":
            unsloth_patches.bring_in(self.work.path, compiled=self.spec.train.torch_compile)
        self.trained_by = choice.engine

    def _family_name(self) -> str | None:
        """None where the model cannot be read: whoever needs it says what is wrong."""
        with suppress(JobError):
            return families.find(self.spec.model)[0].name
        return None

    @cached_property
    def family(self) -> families.Family:
        directory = model_source.fetch_model(self.given.model, self.cache_dir, self.cache_limit)
        return self.bind(directory, self.given.model.uri)

    @cached_property
    def models(self) -> Any:
        from job.engines.models import Models

        return Models(self.spec, self.engine, self.family)

    def bind(self, directory: Path, uri: str | None = None) -> families.Family:
        checkpoint = families.read_checkpoint(uri or str(directory), directory)
        return families.bind(checkpoint, self.spec.model, self.spec.data)

    def _trained_model(self) -> Any:
        return self.models.trained(self._adapter_path(), self._family_of_weights)

    def _adapter_path(self) -> Path | None:
        if self.spec.lora.method == "full":
            return None
        return self.output.fetch(self.record.stages["train"]) / "adapter"

    def _family_of_weights(self) -> families.Family:
        return self.bind(self.output.fetch(self.record.stages["train"]) / "weights")

"""The stages: each fills a folder and returns its summary.

`job.pipeline.runner` decides which stages run, and publishes their folders.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import families, log
from job.artifacts.records import PREDICTIONS
from job.errors import DataError
from job.evaluation.answer_kinds import NORMALIZERS
from job.evaluation.prompts import questions
from job.local import eviction
from job.pipeline.context import RunContext
from job.pipeline.fingerprints import Stage
from job.pipeline.requirements import require_exportable, require_images
from job.prep import cache
from job.prep.prepare import PrepInputs, prepare
from job.prep.prepared_data import STATS
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from job.train.result import TrainResult

Summary = dict[str, Any]
"""A stage's result as JSON, for later stages and for run.json."""


CHECKED_ROWS = 16
"""Rows of each split that are encoded before the baseline, which may take an hour; all rows are
encoded before training."""


class Stages:
    """The stages of one run, by name."""

    def __init__(self, run: RunContext) -> None:
        self._run, self._spec = run, run.spec
        self._checked = False

    def by_name(self) -> Mapping[Stage, Callable[[Path], Summary]]:
        return {
            "prep": self.prep,
            "baseline": self.baseline,
            "train": self.train,
            "reinforce": self.reinforce,
            "eval": self.eval,
            "export": self.export,
            "card": self.card,
            "report": self.report,
            "push": self.push,
        }

    def prep(self, directory: Path) -> Summary:
        """Prepares the rows, or takes them from the cache if an earlier run had the same inputs."""
        run, target = self._run, directory / "data"
        identity, prepared = run.fingerprint("prep"), run.cache_dir / eviction.PREPARED
        rows = cache.restore(prepared, identity, target)
        if rows is not None:
            log.info("rows found in the cache", kept=prepared)
        else:
            rows = self._prepare(target, identity)
            cache.store(prepared, identity, target, rows)
            if run.cache_limit:
                eviction.make_room(run.cache_dir, run.cache_limit, keep=prepared / identity[:32])
        log.info("data", **rows)
        require_images(self._spec, families.resolve_offline(self._spec.model), target)
        run.require_checked_model()  # nothing is stored at the output before
        return {"rows": rows, "answers": _answers(target)}

    def baseline(self, directory: Path) -> Summary:
        """Evaluates the model before training: the base, with the adapter that is continued."""
        self._preflight_checks()
        model, adapter = self._run.initial_model(), self._run.inputs.adapter
        if adapter is not None:
            log.info("the baseline is the model with the adapter", adapter=adapter.uri)
        summary = self._evaluate(model, directory, "baseline", "baseline.predictions")
        return summary | ({"adapter": adapter.uri} if adapter is not None else {})

    def train(self, directory: Path) -> Summary:
        """Trains the adapter, or the weights, with all processes."""
        from job.pipeline import training
        from job.train.throughput import shown_throughput

        run = self._run
        self._preflight_checks()
        identity = run.inputs.checkpoint_identity()
        self._start_workers()
        model, result = training.train(run, directory, identity)
        assert result is not None
        if model is None:  # it is sharded over the processes
            run.models.release()
        else:
            run.models.keep_trained(model)
        log.info(
            "trained",
            step=result.steps,
            **_losses(result),
            **_kept(result),
            took=log.seconds(result.seconds),
            tokens_per_second=result.tokens_per_second,
            **shown_throughput(result.tflops, result.mfu),
            peak_memory=log.byte_count(result.peak_memory_bytes),
            memory=log.byte_count(run.accelerator.memory_bytes),
        )
        return result.to_json()

    def reinforce(self, directory: Path) -> Summary:
        """Continues the trained adapter by the rewards of its answers."""
        from job.pipeline import reinforcing

        run = self._run
        self._preflight_checks()
        model, result = reinforcing.reinforce(run, directory)
        run.models.keep_trained(model)
        log.info(
            "reinforced",
            step=result.steps,
            first_reward=result.first_reward,
            reward=result.last_reward,
            equal_groups=result.equal_groups,
            took=log.seconds(result.seconds),
            generating=f"{result.generating_share:.0%}",
            peak_memory=log.byte_count(result.peak_memory_bytes),
        )
        if not result.learned:
            run.record.warnings.append("reinforce: nothing was learned: no rewards differed")
        elif result.reward_fell:
            run.record.warnings.append("reinforce: the reward fell to less than half")
        return result.to_json()

    def eval(self, directory: Path) -> Summary:
        """Evaluates the trained model."""
        return self._evaluate(self._run.trained_model(), directory, "final", "predictions")

    def export(self, directory: Path) -> Summary:
        """Merges the adapter into the weights, and verifies the result."""
        from job.export.export import export
        from job.export.export_context import ExportContext

        run = self._run
        _log_requests(self._spec, self._run.family)
        if not self._spec.export.merged.enabled:
            return {"merged": False}
        context = ExportContext(
            spec=self._spec,
            engine=run.engine,
            family=run.family,
            rows=run.data.rows("eval"),
            adapter=run.adapter_path(),
            directory=directory,
            load_trained=run.trained_model,
            load_base=run.models.base,
            release=run.models.release,
            bind_merged=run.bind,
            on_shard_written=functools.partial(run.output.stages.upload_eagerly, "export"),
            digest_tree=run.output.stages.digests.tree,
        )
        return export(context).to_json()

    def card(self, directory: Path) -> Summary:
        """Writes the model cards of the adapter and the merged weights."""
        from job.pipeline import cards

        return cards.write(self._run, directory)

    def report(self, directory: Path) -> Summary:
        """Writes `report.html` from the results of all other stages."""
        from job.evaluation import report

        run = self._run
        page = report.render(
            report.RunResults(
                name=self._spec.name,
                settings=run.loaded.resolved,
                changed=run.loaded.changed,
                stages=run.record.stages,
                inputs=run.record.inputs,
                versions=run.record.versions,
                history=self._read_lines("train", "train/history.jsonl"),
                before=self._read_lines("baseline", "eval/baseline.predictions.jsonl"),
                after=self._read_lines("eval", PREDICTIONS),
                rows=run.data.rows("eval"),
                rejects=self._read_lines("prep", "data/rejects.jsonl"),
                statistics=self._read_json("prep", "data/stats.json"),
                lengths=self._read_json("train", "train/lengths.json"),
                reinforced=self._read_lines("reinforce", "reinforced/history.jsonl"),
                samples=self._read_lines("reinforce", "reinforced/samples.jsonl"),
            )
        )
        (directory / report.REPORT).write_text(page, encoding="utf-8")
        return {"bytes": len(page.encode())}

    def push(self, directory: Path) -> Summary:
        """Pushes the export to the hub; writes no file at the output."""
        from job.pipeline import pushing

        return pushing.push(self._run)

    # --- parts of stages ---------------------------------------------------------------------

    def _prepare(self, directory: Path, identity: str) -> dict[str, int]:
        inputs = PrepInputs(
            spec=self._spec.data,
            train=self._run.inputs.train_sources,
            evaluation=self._run.inputs.eval_source,
            validation=self._run.inputs.validation_source,
            seed=self._spec.train.seed,
            normalize_label=NORMALIZERS[self._spec.eval.answer],
            classes=self._spec.eval.answer == "label",
            identity=identity,
            control_tokens=self._run.inputs.control_tokens,
            published_at=self._run.output.at("data"),
        )
        check = functools.partial(self._run.require_checked_model, wait=False)
        try:
            data = prepare(inputs, directory, check)
        except DataError:
            self._run.require_checked_model()  # what is wrong with the spec is said first
            raise
        rows = {
            "train": data.train_rows,
            "eval": data.eval_rows,
            "rejected": data.rejected_rows,
            "leaked": data.leaked_rows,
        }
        if data.validation_rows is not None:
            rows["validation"] = data.validation_rows
            rows["leaked_validation"] = data.leaked_validation_rows
        return rows

    def _preflight_checks(self) -> None:
        """Checks for errors that would otherwise show up only after hours of work."""
        require_images(self._spec, type(self._run.family), self._run.data.directory)
        if not self._checked:
            self._require_encodable_rows()
            require_exportable(self._run)
            self._checked = True

    def _require_encodable_rows(self) -> None:
        """Raises DataError if the chat template does not fit the first rows of a split."""
        data, family = self._run.data, self._run.family
        for rows in (data.measured_rows(), data.rows("eval")):
            for number in range(min(len(rows), CHECKED_ROWS)):
                row = rows[number]
                family.encode(row)
                for question in questions([row], self._spec.eval.turns):
                    family.encode_prompt(row.id, question.asked, question.images)

    def _start_workers(self) -> None:
        """Starts the training in the other processes, once this machine's files are complete."""
        run = self._run
        if run.coordinator is None:
            return
        run.models.to_train()  # fetched first: this machine's other processes use the same files
        prep = run.record.stages["prep"]
        run.fetch_rows(prep)
        run.coordinator.publish("train", {"prep": prep.to_json(), "work": str(run.work.path)})

    def _evaluate(
        self, model: "PreTrainedModel | PeftModel", directory: Path, name: str, file: str
    ) -> Summary:
        import torch

        from job.evaluation.evaluate import evaluate, write

        torch.manual_seed(0)  # sampled answers must not depend on earlier work, such as training
        evaluation = evaluate(
            model,
            self._run.family,
            self._run.data.rows("eval"),
            self._spec.eval,
            batch_size=self._spec.train.per_device_eval_batch_size,
            label=f"evaluate {name}",
        )
        write(evaluation, directory, name, f"{file}.jsonl")
        summary = evaluation.summary()
        log.info(
            name,
            **evaluation.metrics,
            turns=evaluation.turns,
            cut_short=log.fraction(summary["cut_short"], summary["answers"]),
        )
        return summary

    def _read_lines(self, stage: Stage, path: str) -> list[dict[str, Any]]:
        """The lines of a stage's JSON Lines file; empty if the stage is not complete."""
        if stage not in self._run.record.stages:
            return []
        with self._fetch(stage, path).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def _read_json(self, stage: Stage, path: str) -> dict[str, Any]:
        """The JSON object in a file of a complete stage."""
        content: dict[str, Any]
        content = json.loads(self._fetch(stage, path).read_text(encoding="utf-8"))
        return content

    def _fetch(self, stage: Stage, path: str) -> Path:
        return self._run.output.stages.local.fetch_file(self._run.record.stages[stage], path)


def _answers(data: Path) -> dict[str, int]:
    """How many answers of the training rows are trained, and how many of those with thoughts.

    None in statistics that do not count them, of rows that were cached before they were counted.
    """
    train = json.loads((data / STATS).read_text(encoding="utf-8"))["train"]
    return {
        "trained": train.get("trained_answers", 0),
        "with_thoughts": train.get("trained_answers_with_thoughts", 0),
    }


def _losses(result: "TrainResult") -> dict[str, float]:
    """The first and the last loss, for the log."""
    losses = {"first_loss": result.first_loss, "loss": result.final_loss}
    return {name: loss for name, loss in losses.items() if loss is not None}


def _kept(result: "TrainResult") -> dict[str, object]:
    """The kept step and its metric, beside the last one's, for the log."""
    validation = result.validation
    if validation is None:
        return {}
    metric = validation["metric"]
    return {
        "kept_step": validation["exported_step"],
        "best_step": validation["best_step"],
        f"best_{metric}": validation["best"],
        f"last_{metric}": validation["last"],
    }


def _log_requests(spec: JobSpec, family: families.Family) -> None:
    """Logs what requests to the served model need so that it sees what it was trained on."""
    if spec.data.system is not None:
        log.info(
            "requests to the served model need the system prompt of training",
            system=spec.data.system,
        )
    full = spec.lora.method == "full"
    if spec.model.chat_template is None or full or family.adapter_serving(spec.lora).merged_only:
        return  # merged/ has its own template, and nothing else is served
    log.info(
        "vLLM serves an adapter with the base's chat template unless the training's is named",
        argument="--chat-template adapter-vllm/chat_template.jinja",
    )

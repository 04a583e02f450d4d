"""Runs the stages of a command.

They are prep → baseline → train → reinforce → eval → export → card → report → push.

The stages themselves are in `job.pipeline.stages`. A stage is skipped if its marker at the output
has the current fingerprint (`job.pipeline.fingerprints`).
"""

import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict

from job import log, signals, telemetry
from job.artifacts import provenance, sbom
from job.artifacts.lease_wait import LeaseWait
from job.artifacts.records import RunRecord, StageRecord
from job.distributed.coordinator import Coordinator
from job.errors import JobError, SpecError, Stopped, naming_full_disk, reported
from job.local.process_identity import utc_now
from job.pipeline.context import RunContext
from job.pipeline.fingerprints import MEASURED_STAGES, Stage
from job.pipeline.requirements import require_software, require_trainable
from job.pipeline.stages import Stages
from job.prep.result_checks import TooManyBadRows
from job.spec.load import LoadedSpec, dump_resolved

COMMANDS: Mapping[str, tuple[Stage, ...]] = {
    "prep": ("prep",),
    "train": ("prep", "train", "reinforce", "card"),
    "eval": ("prep", "baseline", "train", "reinforce", "eval", "card", "report"),
    "export": ("prep", "train", "reinforce", "export", "card", "push"),
    "run": (
        *("prep", "baseline", "train", "reinforce", "eval"),
        *("export", "card", "report", "push"),
    ),
}
"""The stages of each command, in order."""

OPTIONAL_STAGES: tuple[Stage, ...] = ("card", "report")
"""An unexpected error in these does not fail the run: the results are complete without them."""


def run(
    loaded: LoadedSpec, command: str = "run", coordinator: Coordinator | None = None
) -> RunRecord:
    """Runs the command's stages, skipping those that are complete; `run` ends with `_SUCCESS`.

    If there are several processes, rank 0 calls this, and directs the others by `coordinator`.
    """
    pipeline = Pipeline(loaded, command, coordinator)
    with pipeline.work, signals.on_abandon(pipeline.fail):
        try:
            pipeline.start()
            for stage in COMMANDS[command]:
                pipeline.run_stage(stage)
            pipeline.finish()
        except BaseException as error:  # noqa: BLE001 - raised again, as what ended the run
            signals.mark_work_ended()
            cause = signals.cause_of(error)
            pipeline.fail(cause)
            raise cause from cause.__cause__
    return pipeline.record


class Pipeline:
    """A run: `start`, then `run_stage` for each stage, then `finish`, or `fail` after an error."""

    def __init__(
        self, loaded: LoadedSpec, command: str, coordinator: Coordinator | None = None
    ) -> None:
        self._context = RunContext(loaded, command, coordinator)
        self._stages = Stages(self._context)
        self._command, self._spec, self._output = command, loaded.spec, self._context.output
        self._status = self._context.status
        self._reporter: telemetry.StatusReporter | None = None
        self._found_finished_run = False
        self.record, self.work = self._context.record, self._context.work

    # --- the run -----------------------------------------------------------------------------

    def start(self) -> None:
        """Acquires the output's lease; checks software and inputs, and chooses the engine."""
        wait = self._spec.runtime.lease_wait
        seconds = None if wait == "auto" else float(wait)
        self._output.acquire(LeaseWait(seconds=seconds, on_wait=self._report_waiting))
        self._status.end_waiting()
        self._context.start_hashing()  # while libraries are imported
        self._found_finished_run = self._output.holds_finished_run
        self._output.write_sbom(sbom.to_text())
        stages = COMMANDS[self._command]
        if "train" in stages:
            self._context.choose_engine()  # first: a chat template is checked by Transformers
        require_software(self._context, stages)
        if "train" in stages:
            require_trainable(self._context, stages)
        if self._reporter is None:
            self._reporter = telemetry.StatusReporter(self._status, self._spec.runtime)
        self._record_provenance()
        if self._output.stages.markers.exists("prep"):  # else beside prep, which waits at its end
            self._context.require_checked_model()
        self._output.start_run(dump_resolved(self._context.loaded))

    def _report_waiting(self) -> None:
        self._status.start_waiting()
        # The job that holds the output may hold the port too, if it runs on this machine.
        with suppress(SpecError):
            self._reporter = telemetry.StatusReporter(self._status, self._spec.runtime)

    def run_stage(self, stage: Stage) -> None:
        """Runs a stage, or skips it if it is complete."""
        if not self._applies(stage):
            return
        if stage == "card":  # it describes those of earlier runs too, as the report does
            self._add_complete_stages(MEASURED_STAGES)
        self.record.stage = stage
        self._status.start_stage(stage)
        with log.stage(stage):
            if stage == "train":
                self._context.keep_trained()
            fingerprint = self._context.fingerprint(stage)
            log.debug("fingerprint", of=stage, is_now=fingerprint)
            complete = self._output.stages.completed(stage, fingerprint)
            if complete is not None:
                log.info(f"{stage}: complete, skipped", made=complete.started)
                self._add_event(stage, "skipped")
                self._add_stage(complete, seconds=0.0)
            else:
                self._execute(stage, fingerprint)
        # Not before: large weights are hashed while prep runs.
        self.record.inputs["model"]["digest"] = self._context.inputs.model.digest
        signals.check()

    def finish(self) -> None:
        """Ends the run; it counts as finished if every stage of the command `run` is complete."""
        self.record.stage = None
        self._add_doubts()
        missing = self._add_complete_stages(COMMANDS["run"])
        changed = not self._output.holds_finished_run
        complete = self._command == "run" or (changed and not missing)
        self._output.finish_run(complete=complete)
        if not changed:
            log.info("nothing to do; the run at the output is already finished")
        elif not complete and self._found_finished_run:
            log.warn(
                "the run at the output is no longer finished",
                to_be_made=", ".join(missing),
                fix="the command run, with the same spec and settings, finishes it again",
            )
        self._output.release()
        self._end_status()
        self.work.remove()

    def fail(self, error: BaseException) -> None:
        """Records why the run ended; a storage error here must not hide `error`."""
        preempted = isinstance(error, Stopped | KeyboardInterrupt)
        self.record.status = "preempted" if preempted else "failed"
        self.record.finished = utc_now()
        self.record.error = [asdict(problem) for problem in reported(error).problems]
        if (stage := self._status.snapshot.stage) is not None:
            self._add_event(stage, "stopped" if preempted else "failed")
        if self._output.lease_held:
            self._store_failure(error)
            self._output.stages.roll_back(urgent=preempted)
            self._output.release()
        self._end_status()
        if isinstance(error, Stopped):
            self._report_kept(error)

    # --- one stage ---------------------------------------------------------------------------

    def _execute(self, stage: Stage, fingerprint: str) -> None:
        """Runs a stage that is not complete, and publishes its files."""
        # First, before any message: from here on, the run at the output is no longer finished.
        self._output.reopen_run(f"{stage} will run")
        log.info(f"{stage}: started")
        self._add_event(stage, "started")
        self._output.save_run()
        started, clock = utc_now(), time.monotonic()
        store, execute = self._output.stages, self._stages.by_name()[stage]
        store.invalidate(stage)
        if stage in ("train", "reinforce", "export"):  # no card may describe other weights
            store.withdraw("card")
        try:
            with naming_full_disk(self.work):
                summary = execute(store.local.create(stage))
        except JobError:
            raise
        except Exception as error:
            if stage not in OPTIONAL_STAGES:
                raise
            self._continue_without(stage, error)
            return
        seconds = time.monotonic() - clock
        record = store.publish(stage, fingerprint, started, seconds, summary)
        log.info(f"{stage}: done", took=log.seconds(seconds))
        self._add_event(stage, "done", seconds=record.seconds)
        self._add_stage(record, seconds)

    def _continue_without(self, stage: Stage, error: Exception) -> None:
        self._output.stages.discard(stage)
        reason = f"{stage}: failed: {type(error).__name__}: {error}"
        log.error(reason, fix="report this as a defect; the other results are complete")
        self._add_event(stage, "failed")
        log.debug("traceback", text="".join(traceback.format_exception(error)))
        self.record.warnings.append(reason)

    # --- the record --------------------------------------------------------------------------

    def _add_doubts(self) -> None:
        """Adds a warning for each reason to doubt the result, so that it does not look normal."""
        metrics = self.record.metrics
        if "final" in metrics:
            from job.evaluation.report.doubts import doubts

            self.record.warnings += doubts(metrics.get("baseline"), metrics["final"])

    def _record_provenance(self) -> None:
        inputs, record = self._context.inputs, self.record
        record.versions = provenance.versions()
        record.machine = provenance.machine()
        record.inputs = {"model": {"uri": inputs.model.uri}}
        if inputs.adapter is not None:
            record.inputs["adapter"] = {"uri": inputs.adapter.uri, "digest": inputs.adapter.digest}
        for key, source in inputs.sources.items():
            name = key.removeprefix("$.data.")
            record.inputs[name] = {"uri": source.uri, "digest": source.digest}
        log.info("run", name=self._spec.name, output=self._spec.output.uri)
        for name, each in record.inputs.items():
            log.debug(f"input {name}", **each)
        log.debug("versions", **record.versions)

    def _add_stage(self, record: StageRecord, seconds: float) -> None:
        self.record.add(record)
        self._output.save_run()
        self._status.finish_stage(record.name, seconds, self.record.metrics)

    def _add_complete_stages(self, stages: Sequence[Stage]) -> list[Stage]:
        """Adds the stages that earlier runs completed; returns those that are not complete.

        Those stages belong to the run at the output, so the report covers them.
        """
        missing: list[Stage] = []
        for stage in stages:
            if stage in self.record.stages or not self._applies(stage):
                continue
            complete = None
            if stage in MEASURED_STAGES or not missing:  # the others depend on all before them
                fingerprint = self._context.fingerprint(stage)
                complete = self._output.stages.completed(stage, fingerprint, quiet=True)
            if complete is None:
                missing.append(stage)
                continue
            self.record.add(complete)
            unordered = self.record.stages
            self.record.stages = {
                each: unordered[each] for each in COMMANDS["run"] if each in unordered
            }
        return missing

    def _applies(self, stage: Stage) -> bool:
        """Whether the spec asks for the stage."""
        if stage == "baseline":
            return self._spec.eval.baseline
        if stage == "reinforce":
            return self._spec.reinforce is not None
        return stage != "push" or self._spec.export.push_to_hub

    def _add_event(self, stage: str, event: str, **more: object) -> None:
        entry = {"time": utc_now(), "stage": stage, "event": event, **more}
        self.record.events.append(entry)

    def _end_status(self) -> None:
        self._status.end(self.record.status)
        if self._reporter is not None:
            self._reporter.close()

    # --- a failure ---------------------------------------------------------------------------

    def _store_failure(self, error: BaseException) -> None:
        try:
            if isinstance(error, TooManyBadRows):
                self._output.stages.publish_file("prep", "data/rejects.jsonl")
            if self._output.holds_finished_run:
                log.info("the finished run at the output is unchanged", output=self._output.uri)
            else:
                self._output.save_run()
        except JobError as failed:
            log.warn("run.json could not be stored", reason=failed)

    def _report_kept(self, error: Stopped) -> None:
        from job.pipeline.interrupted import describe_kept, same_command

        stages = COMMANDS[self._command]
        complete = [stage for stage in stages if stage in self.record.stages]
        # The identity depends on the data, which may not have been located before prep is complete.
        training = "train" in stages and "train" not in complete and "prep" in complete
        store = None
        if training:
            store = self._context.checkpoints(self._context.inputs.checkpoint_identity())
        elif self._applies("reinforce") and "train" in complete and "reinforce" not in complete:
            store = self._context.reinforcement_checkpoints()
        error.report_kept(describe_kept(complete, store), same_command())

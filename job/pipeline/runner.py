"""The job, stage by stage: prep → baseline → train → eval → export → report, each made once.

What each stage does is in `job.pipeline.stages`. A stage whose marker at the output has its
fingerprint is skipped (`job.pipeline.fingerprints`).
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job import log, signals, telemetry
from job.artifacts import provenance, sbom
from job.artifacts.output import utc_now
from job.artifacts.records import RunRecord
from job.distributed.coordinator import Coordinator
from job.errors import JobError, Stopped, disk_full, is_disk_full, reported
from job.pipeline.fingerprints import Stage
from job.pipeline.stages import Stages
from job.prep.prepare import TooManyBadRows
from job.spec.load import LoadedSpec, dump_resolved

# The stages that each command needs, in order.
COMMANDS: Mapping[str, tuple[Stage, ...]] = {
    "prep": ("prep",),
    "train": ("prep", "train"),
    "eval": ("prep", "baseline", "train", "eval", "report"),
    "export": ("prep", "train", "export"),
    "run": ("prep", "baseline", "train", "eval", "export", "report"),
}

# Results are whole without it, so a defect in making it must not cost them.
EXPENDABLE: tuple[Stage, ...] = ("report",)


def run(
    loaded: LoadedSpec, command: str = "run", coordinator: Coordinator | None = None
) -> RunRecord:
    """Runs the command's stages, skipping those that are complete; `run` ends with `_SUCCESS`.

    Where several processes train together this is rank 0; the others follow it by `coordinator`.
    """
    job = Pipeline(loaded, command, coordinator)
    with job.stages.work, signals.on_give_up(job.fail):
        try:
            job.open()
            for stage in COMMANDS[command]:
                job.make(stage)
            job.finish()
        except BaseException as error:  # noqa: BLE001 - raised again, as what it is
            signals.work_ended()
            end = signals.end_of(error)
            job.fail(end)
            raise end from end.__cause__
    return job.record


class Pipeline:
    """The course of one run, from taking its output to how it ended."""

    def __init__(
        self, loaded: LoadedSpec, command: str, coordinator: Coordinator | None = None
    ) -> None:
        self.loaded, self.spec, self.command = loaded, loaded.spec, command
        self.stages = Stages(loaded, command, coordinator)
        self.given, self.output = self.stages.given, self.stages.output
        self.record, self.status = self.stages.record, self.stages.status
        self.reporting: telemetry.Reporting | None = None
        self.was_finished = False
        """Whether the output held a finished run when this one took it."""

    def open(self) -> None:
        """Takes the output and finds every input before any work is done."""
        self.output.take()
        self.was_finished = self.output.holds_finished_run
        self.output.describe(sbom.to_text())
        self._require_what_it_needs()
        self.reporting = telemetry.Reporting(self.status, self.spec.runtime)
        self.record.versions = provenance.versions()
        self.record.machine = provenance.machine()
        self.record.inputs = {
            "model": {"uri": self.given.model.uri, "digest": self.given.model.digest},
        }
        for place, source in self.given.sources.items():
            found = {"uri": source.uri, "digest": source.digest}
            self.record.inputs[place.removeprefix("$.data.")] = found
        log.info("run", name=self.spec.name, output=self.spec.output.uri)
        for name, found in self.record.inputs.items():
            log.debug(f"input {name}", **found)
        log.debug("versions", **self.record.versions)
        self.output.open(dump_resolved(self.loaded))

    def _require_what_it_needs(self) -> None:
        if self.spec.export.verify == "vllm" and "export" in COMMANDS[self.command]:
            from job.export.vllm_proof import require_vllm

            require_vllm()
        if "train" in COMMANDS[self.command]:
            self.stages.choose_engine()
            from job.train import adapting, trackers

            adapting.require(self.spec)
            trackers.require(self.spec.train.report_to)
            if self.spec.train.torch_compile:
                from job.engines import compiling

                compiling.require(self.stages.accelerator.device)

    def make(self, stage: Stage) -> None:
        """Makes a stage, or finds it complete."""
        if stage == "baseline" and not self.spec.eval.baseline:
            return
        if stage == "report":
            self._take_in_complete(COMMANDS["run"][:-1])
        self.record.stage = stage
        self.status.enter(stage)
        with log.stage(stage):
            self._make(stage)
        signals.check()

    def _make(self, stage: Stage) -> None:
        wanted = self.stages.fingerprint(stage)
        log.debug("fingerprint", of=stage, is_now=wanted)
        found = self.output.completed(stage, wanted)
        seconds = 0.0
        if found is not None:
            log.info(f"{stage}: complete, skipped", made=found.started)
            self._event(stage, "skipped")
        else:
            # Before a word of it: whoever stops the job now stops one that is not finished.
            self.output.reopen(f"{stage} is to be made")
            log.info(f"{stage}: started")
            self._event(stage, "started")
            self.output.save_run()
            work: Callable[[Path], dict[str, Any]] = getattr(self.stages, stage)
            started, clock = utc_now(), time.monotonic()
            self.output.withdraw(stage)
            try:
                summary = work(self.output.directory(stage))
            except Exception as error:
                if not isinstance(error, JobError) and is_disk_full(error):
                    raise disk_full(error, self.output.workdir) from error
                if stage not in EXPENDABLE or isinstance(error, JobError):
                    raise
                self._go_on_without(stage, error)
                return
            seconds = time.monotonic() - clock
            found = self.output.publish(stage, wanted, started, seconds, summary)
            log.info(f"{stage}: done", took=log.span(seconds))
            self._event(stage, "done", seconds=found.seconds)
        self.record.add(found)
        self.output.save_run()
        self.status.finish(stage, seconds, self.record.metrics)

    def finish(self) -> None:
        """Ends the run; it is finished if every stage of a whole run is complete."""
        self.record.stage = None
        missing = self._take_in_complete(COMMANDS["run"])
        made = not self.output.holds_finished_run
        complete = self.command == "run" or (made and not missing)
        self.output.finish(complete=complete)
        if not made:
            log.info("nothing was to be made; the run at the output is finished as it was")
        elif not complete and self.was_finished:
            log.warn(
                "the run at the output is not finished any more",
                to_be_made=", ".join(missing),
                fix="the command run, with the same spec and settings, finishes it again",
            )
        self.output.release()
        self._end()
        self.stages.work.remove()

    def _take_in_complete(self, stages: Sequence[Stage]) -> list[Stage]:
        """Enters those of the stages that others made; gives those that are not complete.

        They are a part of the run that is at the output, and the report tells of them.
        """
        missing: list[Stage] = []
        for stage in stages:
            if stage in self.record.stages or (stage == "baseline" and not self.spec.eval.baseline):
                continue
            found = None
            if stage != "report" or not missing:  # it is made from all others
                found = self.output.found_complete(stage, self.stages.fingerprint(stage))
            if found is None:
                missing.append(stage)
                continue
            self.record.add(found)
            made = self.record.stages
            self.record.stages = {each: made[each] for each in COMMANDS["run"] if each in made}
        return missing

    def fail(self, error: BaseException) -> None:
        """Records why the run ended; storage that fails now must not hide the first error."""
        preempted = isinstance(error, Stopped | KeyboardInterrupt)
        self.record.status = "preempted" if preempted else "failed"
        self.record.finished = utc_now()
        self.record.error = [asdict(problem) for problem in reported(error).problems]
        if (stage := self.status.now.stage) is not None:
            self._event(stage, "stopped" if preempted else "failed")
        self._store_failure(error)
        self._end()
        if isinstance(error, Stopped):
            self._tell_kept(error)

    def _tell_kept(self, error: Stopped) -> None:
        from job.pipeline.interrupted import kept, same_command

        stages = COMMANDS[self.command]
        complete = [stage for stage in stages if stage in self.record.stages]
        # Before prep is done no data may have been found yet, which the identity looks for.
        training = "train" in stages and "train" not in complete and "prep" in complete
        store = self.stages.checkpoints(self.given.identity_of_checkpoints()) if training else None
        error.report_kept(kept(complete, store), same_command())

    def _store_failure(self, error: BaseException) -> None:
        if not self.output.taken:
            return
        try:
            if isinstance(error, TooManyBadRows):
                self.output.publish_file("prep", "data/rejects.jsonl")
            if self.output.holds_finished_run:
                log.info("the finished run at the output stays as it is", output=self.output.uri)
            else:
                self.output.save_run()
        except JobError as failed:
            log.warn("run.json could not be stored", reason=failed)
        self.output.take_back(in_a_hurry=isinstance(error, Stopped | KeyboardInterrupt))
        self.output.release()

    def _event(self, stage: str, event: str, **more: Any) -> None:
        entry = {"time": utc_now(), "stage": stage, "event": event, **more}
        self.record.events.append(entry)

    def _end(self) -> None:
        """Tells who watches how the run ended."""
        self.status.end(self.record.status)
        if self.reporting is not None:
            self.reporting.close()

    def _go_on_without(self, stage: Stage, error: Exception) -> None:
        self.output.discard(stage)
        reason = f"{stage}: not made: {type(error).__name__}: {error}"
        log.error(reason, fix="report this as a defect; the other results are whole")
        self._event(stage, "failed")
        log.debug("traceback", text="".join(traceback.format_exception(error)))
        self.record.warnings.append(reason)

"""Checks before the expensive work of a run: software, and that model and data fit together."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from job import families, log
from job.errors import DataError, InputError
from job.pipeline.context import RunContext
from job.pipeline.fingerprints import Stage
from job.prep.prepared_data import STATS
from job.spec.types import JobSpec


def require_software(run: RunContext, stages: Sequence[Stage]) -> None:
    """Requires the packages that the stages need, a chat template that fits, and access to the hub
    if the export is pushed."""
    spec = run.spec
    if {*stages} & {"baseline", "train", "eval", "export"}:
        from job.engines.device import require_four_bit

        require_four_bit(spec.model)
    if spec.model.chat_template is not None or spec.data.system is not None:
        run.bind_headers()  # raises if they do not fit, before rows are prepared
    if spec.export.verify == "vllm" and "export" in stages:
        from job.export.vllm_server import require_vllm

        require_vllm()
    if spec.export.push_to_hub and "push" in stages and not run.output.holds_finished_run:
        from job.pipeline import pushing

        pushing.prepare(spec)


def require_trainable(run: RunContext, stages: Sequence[Stage]) -> None:
    """Requires what the training needs.

    Starts what takes seconds, to run beside prep: trials of the device and the check of the model.
    """
    spec = run.spec
    log_idle_gpus(run)
    run.begin_trials()  # while libraries are imported
    from job.train import trackers

    trackers.require(spec.train.report_to)
    if spec.reinforce is not None:
        from job.pipeline import reinforcing

        reinforcing.require_one_process(run)
        reinforcing.require_optimizer(run)
        assert run.inputs.rewards, "the schema requires one"
    if spec.train.torch_compile is True:
        from job.engines import compiling

        compiling.require(run.accelerator.device)
    run.begin_model_check(_model_check(run, stages))


def _model_check(run: RunContext, stages: Sequence[Stage]) -> Callable[[], None]:
    """The check that the spec fits the model's architecture, and the whole model its device."""
    from job.pipeline import whole_model
    from job.train import adapting

    start, loads = run.start_adapter, not run.output.holds_finished_run

    def check() -> None:
        adapting.require(run.spec, start)
        if loads:
            whole_model.require_room(run, stages)
            # With bitsandbytes and torch's compiler: the first model would wait for seconds.
            import peft  # noqa: F401

    return check


def log_idle_gpus(run: RunContext) -> None:
    """Logs how all GPUs of the machine would train, if one of several will and the spec allows all.

    A user with eight would otherwise pay for seven that idle, and see nothing of it.
    """
    import torch

    gpus = torch.cuda.device_count()
    if run.accelerator.kind == "cpu" or run.processes > 1 or gpus < 2:
        return
    one_process = run.engine_name == "unsloth" or run.spec.reinforce is not None
    if not one_process and run.spec.runtime.distributed != "none":
        command = f"torchrun --nproc-per-node {gpus} -m job {run.command} SPEC"
        log.info("one GPU of several trains", gpus=gpus, command_for_all=command)


def require_images(
    spec: JobSpec, family: type[families.Family] | None, data_directory: Path
) -> None:
    """Raises DataError if the model reads images and no training row has one."""
    if family is None or not family.reads_images or spec.data.text_only:
        return
    statistics = json.loads((data_directory / STATS).read_text(encoding="utf-8"))
    if not statistics["train"]["images"]:
        raise DataError(
            "$.data.train",
            f"none of the {statistics['train']['rows']} training rows has an image, but the "
            "model reads images",
            value=spec.model.model_name_or_path,
            fix="name the image column, columns: {image: NAME}; or set data.text_only: true if the "
            "rows have none on purpose",
        )


def require_exportable(run: RunContext) -> None:
    """Writes all files of an adapter and an export except weights, and discards them.

    Otherwise an error in the base's own files would show up only after the training.
    """
    import torch

    merged, adapts = run.spec.export.merged, run.spec.lora.method == "lora"
    with TemporaryDirectory() as folder:
        try:
            if adapts:
                run.family.save_processor(Path(folder))
            if merged.enabled or not adapts:
                dtype = getattr(torch, merged.dtype)
                run.family.save_settings(Path(folder), dtype=dtype, layout=merged.layout)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(
                run.inputs.model.uri,
                "its configuration, processor or tokenizer cannot be written for an export: "
                f"{type(error).__name__}: {error}",
                fix="correct the small files of the checkpoint",
            ) from error

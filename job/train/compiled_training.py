"""Compiles a model's blocks for training, if the spec or the choice for `auto` says so."""

from transformers.modeling_layers import GradientCheckpointingLayer

from job import log
from job.distributed import process_group
from job.engines.compiling import CompiledBlocks, compile_blocks, obstacle
from job.engines.ways import COMPILED
from job.train.adapting import AdaptedModel
from job.train.capturing import may_capture
from job.train.compile_choice import CompileChoice, StepWork, choose
from job.train.train_context import TrainContext
from job.train.trainer_setup import planned_sampler, schedule_of
from job.train.training_rows import TrainingRows


def compile_model(
    context: TrainContext, rows: TrainingRows, adapted: AdaptedModel
) -> tuple[CompiledBlocks | None, CompileChoice]:
    """The compiled blocks, or None; and why. All processes compile, or none does.

    An engine with its own forward passes compiles those itself.
    """
    choice, engine = _choice(context, rows, adapted), context.engine
    if context.spec.train.torch_compile == "auto":
        verdict = "blocks are compiled" if choice.compiled else "blocks are not compiled"
        log.info(f"{verdict}: {choice.reason}")
    if not choice.compiled or engine.patches_forward:
        return None, choice
    blocks = compile_blocks(adapted.model, fuse=not engine.autocast)
    log.info("blocks are compiled at their first call", blocks=len(blocks))
    return blocks, choice


def _choice(context: TrainContext, rows: TrainingRows, adapted: AdaptedModel) -> CompileChoice:
    spec, accelerator = context.spec, context.accelerator
    sampler = planned_sampler(spec, rows, padding_free=adapted.padding_free)
    layers = [m for m in adapted.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    choice = choose(
        spec,
        StepWork(
            steps=schedule_of(spec.train, sampler).steps,
            tokens_a_step=spec.train.rows_a_step * rows.statistics["tokens_a_row"]["mean"],
            blocks=len(layers),
            captured=may_capture(context, adapted),
        ),
        on_gpu=accelerator.kind != "cpu",
        patches_forward=context.engine.patches_forward,
    )
    if spec.train.torch_compile != "auto" or not choice.compiled:
        return choice
    # The compiler that is installed now, then what compiling gave at the trial.
    found = obstacle(accelerator.device) or context.ways.obstacle(COMPILED)
    reasons = [each for each in process_group.all_gather(found) if each]
    return CompileChoice(compiled=False, reason=reasons[0]) if reasons else choice

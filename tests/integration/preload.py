"""What the job imports, for processes to be forked with it loaded; no threads are started."""

import gc
import os
from pathlib import Path

# As the job sets it for several processes; torch reads it while it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import datasets
import matplotlib.backends.backend_svg
import matplotlib.figure
import matplotlib.mathtext
import peft
import peft.utils.transformers_weight_conversion
import pydantic
import rapidfuzz.distance
import sacrebleu
import torch
import transformers
import transformers.models.ernie4_5_vl_moe.image_processing_ernie4_5_vl_moe
import transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe
import transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe
import transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe
import typer._adapters
from transformers import Trainer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import job.cli.app
import job.cli.infer
import job.engines.models
import job.evaluation.evaluate
import job.evaluation.render_match
import job.evaluation.report.charts
import job.evaluation.validation_answers
import job.export.export
import job.families.ernie45_vl.activation_memory
import job.families.ernie45_vl.collate
import job.families.ernie45_vl.lora_targets
import job.families.ernie45_vl.packed.decoder
import job.families.ernie45_vl.published_format.processor
import job.families.ernie45_vl.published_format.served
import job.families.ernie45_vl.published_format.weights
import job.pipeline.cards
import job.pipeline.runner
import job.pipeline.training
import job.planning.plan
import job.train.callbacks.progress
import job.train.checkpoint.resume
import job.train.checkpoint.safetensors_trainer
import job.train.train
import job.train.validating_trainer
from job.evaluation.report.environment import environment
from job.evaluation.report.figure import Curve, draw
from job.export import markdown, model_card
from job.prep.formulas import render_latex

__all__ = [
    "Trainer", "datasets", "job", "matplotlib", "peft", "pydantic", "rapidfuzz", "sacrebleu",
    "torch", "transformers", "typer",
]  # fmt: skip

# What the first use of each builds, and every forked process would build again.
render_latex(r"\frac{x}{2}")  # the parser of formulas, and their font
draw("x", [Curve(name="x", points=[(0, 1), (1, 2)])])  # the font of charts, and their styles
get_checkpoint_conversion_mapping("ernie4_5_vl_moe")  # hundreds of expressions
environment().get_template("page.html.jinja")
environment().get_template("macros.html.jinja")
markdown.environment(Path(model_card.__file__).parent).get_template("model_card.md.jinja")

# A collection in a forked process would visit, and so copy, all that it shares with this one.
gc.collect()
gc.freeze()

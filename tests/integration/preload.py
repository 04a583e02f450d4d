"""What the job imports, for processes to be forked with it loaded; no threads are started."""

import os

# As the job sets it for several processes; torch reads it while it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import datasets
import peft
import torch
import transformers
from transformers import Trainer

import job.export.export
import job.families.ernie45_vl
import job.pipeline.runner
import job.train.callbacks.progress
import job.train.checkpoint.safetensors_trainer
import job.train.validating_trainer

__all__ = ["Trainer", "datasets", "job", "peft", "torch", "transformers"]

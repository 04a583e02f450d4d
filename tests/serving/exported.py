"""Fixtures for serving: a base and an adapter of noise, with the outputs of both."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from job import engines, families
from job.engines.base import Engine
from job.engines.device import Accelerator
from job.export import vllm_server
from job.export.merge import Merge
from job.export.proof import ProbeOutputs, probe_outputs
from job.prep import formulas
from job.prep.images import inspect
from job.prep.rows import EncodedImage, Message, Part, Row
from job.spec.types import JobSpec
from tests.models import add_noise

ROUNDING = 0.05  # of log-probabilities, by fp16
ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
MARKS = [
    pytest.mark.serving,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        vllm_server.PYTHON not in os.environ, reason="needs `make test-serving`, which has a vLLM"
    ),
]


@dataclass(frozen=True)
class Exported:
    """A base in vLLM's layout and an adapter, with the outputs of both."""

    family: families.Family
    rows: list[Row]
    merged: Path
    adapter: Path
    base_outputs: ProbeOutputs
    adapter_outputs: ProbeOutputs


def engine_for(spec: JobSpec) -> Engine:
    accelerator = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
    return engines.create(spec.model, spec.lora, accelerator)


def export(
    spec: JobSpec, family: families.Family, base: Any, directory: Path, noise: float
) -> Exported:
    """Writes the base in fp16, and an adapter of noise on it, to `directory`."""
    rows = [_row(spec, family, number) for number in range(4)]
    base_outputs = probe_outputs(base, family, rows)
    family.save(
        base,
        Merge(base, dtype=torch.float16, keeps_fp32=family.keeps_fp32).weights(),
        directory / "merged",
        dtype=torch.float16,
        max_shard_size=spec.export.merged.max_shard_size,
        layout="vllm",
    )
    targets = family.lora_targets(base, spec.lora)
    model = engine_for(spec).attach_adapter(base, targets, spec.lora, 5)
    add_noise(model, noise)
    adapter_outputs = probe_outputs(model.eval(), family, rows)
    model.save_pretrained(directory / "adapter")
    family.write_served_adapter(directory / "adapter", directory / "adapter-vllm")
    return Exported(
        family,
        rows,
        directory / "merged",
        directory / "adapter-vllm",
        base_outputs,
        adapter_outputs,
    )


@contextmanager
def served(exported: Exported, log_file: Path) -> Iterator[vllm_server.VllmServer]:
    """A vLLM on the base, with the adapter beside it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ON_A_CPU.items():
            patch.setenv(name, value)
        with vllm_server.serve(
            exported.merged,
            exported.family,
            dtype="float16",
            log_file=log_file,
            adapter=exported.adapter,
        ) as server:
            yield server


def _row(spec: JobSpec, family: families.Family, number: int) -> Row:
    """A formula to read, or a sum if the model is text-only."""
    asked: tuple[Part, ...]
    images: tuple[EncodedImage, ...] = ()
    if family.reads_images:
        sample = formulas.sample(spec.data.train[0].formulas, number)
        asked, answer = (Part(image=0), Part(text=spec.data.question)), sample.latex
        images = (inspect(sample.png),)
    else:
        asked, answer = (Part(text=f"What is {number} plus {number}?"),), str(2 * number)
    said = Message(role="user", parts=asked)
    return Row(
        id=str(number),
        messages=(said, Message(role="assistant", parts=(Part(text=answer),))),
        images=images,
    )

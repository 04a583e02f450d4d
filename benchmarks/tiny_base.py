"""Evaluates the weights that ship as `builtin://ernie-vl-tiny`, on a CPU.

The held-out formulas are those of the spec that trained the weights; none of their labels occurs in
its training set. Run from the repository:

    python -m benchmarks.tiny_base
"""

import hashlib
import os
import platform
from pathlib import Path

from benchmarks import record
from job import engines, families
from job.engines.device import Accelerator
from job.evaluation.evaluate import Evaluation, evaluate
from job.families import model_source
from job.prep import formulas
from job.prep.images import inspect
from job.prep.rows import Message, Part, Row
from job.spec.load import load_spec

SPEC = Path(__file__).parents[1] / "specs" / "tiny-base.yaml"
MODEL = model_source.MODELS / "ernie-vl-tiny"
WEIGHTS = MODEL / "model.safetensors"
BATCH = 50


def measure(count: int) -> Evaluation:
    """Greedy answers to the first `count` held-out formulas, and their scores."""
    spec = load_spec(SPEC.read_text(), SPEC.name, ["model.init=pretrained"], {}).spec
    family = families.bind(families.read_checkpoint(str(MODEL), MODEL), spec.model, spec.data)
    accelerator = Accelerator(kind="cpu", name=platform.machine(), memory_bytes=2**32)
    model = engines.create(spec.model, spec.lora, accelerator).load(family)
    held_out = spec.data.eval or spec.data.train[0]
    samples = [formulas.sample(held_out.formulas, index) for index in range(count)]
    rows = [row_of(sample, str(spec.data.question)) for sample in samples]
    return evaluate(model, family, rows, spec.eval, batch_size=BATCH, label="tiny base")


def row_of(sample: formulas.FormulaSample, instruction: str) -> Row:
    return Row(
        id=sample.latex,
        messages=(
            Message(role="user", parts=(Part(image=0), Part(text=instruction))),
            Message(role="assistant", parts=(Part(text=sample.latex),)),
        ),
        images=(inspect(sample.png),),
    )


def main() -> None:
    found = measure(1000)
    measured = {
        "weights_sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "rows": len(found.predictions),
        "final": found.metrics,
        "seconds": found.seconds,
        "generated_tokens_per_second": found.tokens_per_second,
        "training": "benchmarks/results/tiny-base-h200.json",
    }
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    record.write("tiny-base", "benchmarks.tiny_base", device, measured, ("torch", "transformers"))


if __name__ == "__main__":
    main()

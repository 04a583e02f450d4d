"""Measures what the load-balancing loss of routers does to a LoRA training, on the tiny model.

    python -m benchmarks.router_loss

Trains adapters with routed experts on the formulas of `specs/latex.yaml`, in ways that differ in
one setting: the weight of the loss, or whether gate and up have an A each or share one. Each way
runs with several seeds, to show how far equal settings differ.
"""

import argparse
import copy
import os
import platform
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import record
from benchmarks.tiny_base import row_of
from job import engines, families
from job.engines.device import Accelerator
from job.evaluation.evaluate import evaluate
from job.families import model_source
from job.families.base import SORTED_EXPERTS
from job.families.lora.gate_up import untrained_zeros
from job.prep import formulas
from job.spec.load import load_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from job.prep.rows import Row
    from job.spec.types import JobSpec

SPEC = Path(__file__).parents[1] / "specs" / "latex.yaml"
MODEL = model_source.MODELS / "ernie-vl-tiny"
OWN = {"finetune_experts": True}
SHARED = {"target_parameters": ("experts.gate_up_proj", "experts.down_proj")}
WAYS: dict[str, tuple[float, dict[str, Any]]] = {
    "weight 0": (0, OWN),
    "weight 0.001": (0.001, OWN),
    "weight 0, one A for gate and up": (0, SHARED),
}
RATE, WARM_UP = 2e-3, 5


class Comparison:
    """Trainings on the same rows, of the same base."""

    def __init__(self, spec: "JobSpec", *, steps: int, rows: int, held_out: int) -> None:
        self.spec, self.steps, self.rows = spec, steps, rows
        self.family = families.bind(
            families.read_checkpoint(str(MODEL), MODEL), spec.model, spec.data
        )
        accelerator = Accelerator(kind="cpu", name=platform.machine(), memory_bytes=2**32)
        self.engine = engines.create(spec.model, spec.lora, accelerator)
        self.base = self.engine.load(self.family)
        self.family.use_packed_step(self.base)
        self.family.set_experts_implementation(self.base, SORTED_EXPERTS)
        sources = spec.data.train[0], spec.data.eval or spec.data.train[0]
        question = str(spec.data.question)
        self.training, self.held_out = (
            [row_of(formulas.sample(source.formulas, n), question) for n in range(count)]
            for source, count in zip(sources, (steps * rows, held_out), strict=True)
        )

    def run(self, weight: float, lora: dict[str, Any], seed: int) -> dict[str, Any]:
        """One training and its evaluation."""
        settings = replace(self.spec.lora, **lora)
        base = copy.deepcopy(self.base)
        targets = self.family.lora_targets(base, settings)
        model = self.engine.attach_adapter(base, targets, settings, seed)
        self.family.set_router_aux_loss(base, weight)
        losses = self._train(model, weight, seed)
        self.family.set_router_aux_loss(base, 0)
        model.eval()
        found = evaluate(
            model, self.family, self.held_out, self.spec.eval, batch_size=64, label="tiny"
        )
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {
            "trainable_parameters": adapter - untrained_zeros(model),
            "loss": found.metrics["loss"],
            "cer": found.metrics["cer"],
            "exact_match": found.metrics["exact_match"],
            "busiest_expert": self._busiest(base),
            "training_losses": [
                round(statistics.mean(losses[n : n + 10]), 4) for n in range(0, self.steps, 10)
            ],
        }

    def _train(self, model: Any, weight: float, seed: int) -> list[float]:  # noqa: ANN401 - PEFT's
        """The cross-entropy of each step, without the routers' loss."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=self.spec.train.weight_decay)
        order = torch.randperm(
            len(self.training), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        model.train()
        losses = []
        for step in range(self.steps):
            chosen = order[step * self.rows : (step + 1) * self.rows]
            out = model(**self._packed([self.training[n] for n in chosen]))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            factor = min((step + 1) / WARM_UP, 1 - step / self.steps)
            optimizer.param_groups[0]["lr"] = RATE * factor
            optimizer.step()
            optimizer.zero_grad()
            aux = 0 if out.aux_loss is None else weight * float(out.aux_loss)
            losses.append(float(out.loss) - aux)
        return losses

    def _busiest(self, base: "PreTrainedModel") -> dict[str, float]:
        """The busiest expert's share of its router's tokens, times the number of experts.

        On the held-out rows, as a mean over the routers of text and of image tokens; 1 if all
        experts are equally busy.
        """
        loads: dict[str, torch.Tensor] = {}
        hooks = []
        for name, module in base.named_modules():
            if not name.endswith("_moe.gate"):
                continue

            def count(gate: Any, _: Any, outputs: Any, name: str = name) -> None:  # noqa: ANN401
                chosen = outputs[2].flatten().bincount(minlength=gate.num_experts)
                loads[name] = loads.get(name, 0) + chosen

            hooks.append(module.register_forward_hook(count))
        with torch.no_grad():
            base(**self._packed(self.held_out))
        for hook in hooks:
            hook.remove()
        shares = {name: float(load.max() / load.sum()) * len(load) for name, load in loads.items()}
        return {
            kind: round(statistics.mean(v for n, v in shares.items() if f"{kind}_moe" in n), 3)
            for kind in ("text", "vision")
        }

    def _packed(self, rows: "list[Row]") -> Any:  # noqa: ANN401 - a batch of the family
        return self.family.pack([self.family.encode(row) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares weights of the routers' loss.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    arguments = parser.parse_args()
    spec = load_spec(SPEC.read_text(), SPEC.name, environ={}).spec
    comparison = Comparison(
        spec, steps=arguments.steps, rows=arguments.rows, held_out=arguments.held_out
    )
    found: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        for way in arguments.ways:
            result = comparison.run(*WAYS[way], seed)
            print(seed, way, result, flush=True)
            found.setdefault(way, {})[str(seed)] = result
    measured = {
        "note": "loss, cer, exact_match and busiest_expert are of the held-out rows; "
        "training_losses are means over ten steps; all without the routers' loss.",
        "steps": arguments.steps,
        "rows_a_step": arguments.rows,
        "held_out_rows": arguments.held_out,
        "ways": found,
    }
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    packages = ("torch", "transformers", "peft")
    record.write("router-loss", "benchmarks.router_loss", device, measured, packages)


if __name__ == "__main__":
    main()

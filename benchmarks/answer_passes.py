"""Processor time of a training pass of reinforcement, its answers padded and packed, on a CPU.

    python -m benchmarks.answer_passes

The tiny model, its adapter trained, and four formulas with eight answers each, of random tokens
and random lengths. Both passes have the same log-probabilities. Writes
benchmarks/results/answer-passes.json.
"""

import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import record
from benchmarks.training import HERE, formula_rows, tiny_family
from job import engines
from job.engines.device import detect
from job.evaluation.prompts import questions
from job.reinforce.answer_scores import Answers, AnswerScores
from job.spec.load import load_spec
from job.train.adapting import AdaptedModel, adapt

SPEC = HERE.parent / "specs" / "latex-grpo.yaml"
ROWS, GENERATIONS, SHORTEST, LONGEST = 4, 8, 10, 120
TOKENS = (100, 400)
"""The range of the answers' tokens, all of them text."""
TURNS = 8


def main() -> None:
    torch.set_num_threads(1)
    settings = ["runtime.accelerator=cpu"]
    spec = load_spec(SPEC.read_text(), str(SPEC), settings, environ={}).spec
    family, accelerator = tiny_family(spec), detect(spec.runtime)
    engine = engines.create(spec.model, spec.lora, accelerator)
    model = family.initialize(seed=0, dtype=torch.float32, device=torch.device("cpu"))
    engine.prepare(model, family)
    adapted = adapt(spec, engine, family, model)
    adapted.model.train()
    rows = questions(list(formula_rows(ROWS)), "last")
    prompts = [family.encode_prompt(each.id, each.asked, each.images) for each in rows]
    answers = sampled()
    ways = {
        name: AnswerScores(
            adapted=replace(adapted, padding_free=packed),
            family=family,
            prompts=SimpleNamespace(encoded=prompts.__getitem__),  # type: ignore[arg-type]
            temperature=1.0,
            autocast=nullcontext,
        )
        for name, packed in (("padded", False), ("packed", True))
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, torch.Tensor] = {}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            took, scores[name] = measured(way, answers, adapted)
            if turn:  # the first one loads and allocates
                seconds[name].append(took)
    off = float((scores["packed"] - scores["padded"]).abs().max())
    found = {name: round(statistics.median(each), 3) for name, each in seconds.items()}
    faster = round(found["padded"] / found["packed"], 2)
    print(found, f"packed passes are {faster} times as fast, scores off by {off:.1e}")
    record.write(
        "answer-passes",
        "benchmarks.answer_passes",
        f"{accelerator.name}, one core",
        {
            "answers": len(answers),
            "answer_tokens": int(answers.present.sum()),
            "seconds": found,
            "times_as_fast": faster,
            "off": off,
        },
        ("torch", "transformers", "trl"),
    )


def sampled() -> Answers:
    """Answers to each row in turn, the same each time."""
    generator = torch.Generator().manual_seed(0)
    count = ROWS * GENERATIONS
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator)
    tokens = torch.randint(*TOKENS, (count, int(lengths.max())), generator=generator)
    present = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return Answers(
        rows=[number // GENERATIONS for number in range(count)], tokens=tokens, present=present
    )


def measured(way: AnswerScores, answers: Answers, adapted: AdaptedModel) -> tuple[float, Any]:
    """Processor seconds of a forward and backward pass, and the log-probabilities."""
    started = time.process_time()
    scores, _ = way.of_all(answers, len(answers))
    scores.sum().backward()
    took = time.process_time() - started
    adapted.model.zero_grad()
    return took, scores.detach()


if __name__ == "__main__":
    main()

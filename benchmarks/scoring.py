"""Processor time to score 100 formulas, by matplotlib's grammar alone and as shipped.

Answers are right, nearly right, truncated or random; nothing is kept from one turn to the next,
except for `labels kept`, where the labels were rendered before, as after a first evaluation. Run
from the repository:

    python -m benchmarks.scoring

writes benchmarks/results/scoring.json.
"""

import json
import os
import platform
import random
import statistics
import time

from benchmarks import record
from job.evaluation import latex, render_match
from job.evaluation.scoring import Scores, score_answers
from job.prep.formulas import grammar, mathtext
from job.spec.answer_kinds import METRICS

ROWS, TURNS, LONGEST = 100, 5, 60
KINDS = ("right", "nearly right", "truncated", "random")


def labels() -> list[str]:
    """Formulas of the lengths of those in papers; the same each time."""
    rng = random.Random(0)  # noqa: S311  no secret
    return [grammar.to_latex(grammar.formula(rng, rng.randint(3, LONGEST))) for _ in range(ROWS)]


def answers(kind: str, expected: list[str]) -> list[str]:
    """An answer of the kind to each label; the same each time."""
    rng = random.Random(1)  # noqa: S311  no secret
    tokens = [token for label in expected for token in latex.tokenize(label)]
    found = []
    for label in expected:
        answer = list(latex.tokenize(label))
        match kind:
            case "nearly right":
                answer[rng.randrange(len(answer))] = rng.choice(tokens)
            case "truncated":
                answer = answer[: rng.randrange(1, len(answer))]
            case "random":
                answer = rng.choices(tokens, k=rng.randint(20, LONGEST))
        found.append(latex.join(answer))
    return found


def forget() -> None:
    """Empties what is kept between evaluations."""
    render_match._ink.cache_clear()
    latex._parsed.cache_clear()


def scored(kind: str) -> tuple[float, Scores]:
    """Processor seconds of scoring, and the scores."""
    expected = labels()
    given = answers(kind, expected)
    started = time.process_time()
    scores = score_answers("latex", given, expected, METRICS["latex"])
    return time.process_time() - started, scores


def main() -> None:
    shipped = mathtext.is_covered
    scored("right")  # imports
    seconds: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for _ in range(TURNS):  # taking turns, so that other load affects all equally
        for kind in KINDS:
            outcomes = []
            for name, covered in (("matplotlib", bool), ("as shipped", shipped)):
                mathtext.is_covered = covered  # type: ignore[assignment]  # bool() is False
                forget()
                took, scores = scored(kind)
                seconds[kind].setdefault(name, []).append(took)
                outcomes.append(scores)
            if outcomes[0] != outcomes[1]:
                raise RuntimeError(f"the scores of {kind} answers differ")
            render_match._ink.cache_clear()
            score_answers("latex", labels(), labels(), [render_match.NAME])
            seconds[kind].setdefault("labels kept", []).append(scored(kind)[0])
    medians = {
        kind: {name: round(statistics.median(values), 3) for name, values in by_name.items()}
        for kind, by_name in seconds.items()
    }
    result = {
        "cpu_seconds_per_100_answers": medians,
        "ratio": {
            kind: round(found["matplotlib"] / found["as shipped"], 1)
            for kind, found in medians.items()
        },
        "turns": TURNS,
    }
    device = f"{platform.machine()} CPU, one of {os.cpu_count()} cores"
    record.write("scoring", "benchmarks.scoring", device, result, ("matplotlib", "sacrebleu"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

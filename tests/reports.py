"""Made-up results of runs, to render reports from."""

import io
import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

from job.artifacts.records import StageRecord
from job.evaluation.metrics import score
from job.evaluation.prompts import questions
from job.evaluation.report import RunResults
from job.evaluation.scoring import score_answers
from job.prep.rows import EncodedImage, Message, Part, Row
from job.prep.statistics import Statistics
from job.spec import answer_kinds as kinds
from job.spec.answer_kinds import Answer
from job.spec.load import load_spec
from job.train.lengths import lengths
from tests.jobs import ROOT

METRICS = {
    "loss": 1.5, "rows": 3, "cer": 0.25, "exact_match": 0.5, "exact_match_normalized": 0.75,
    "token_edit_distance": 0.2, "bleu": 61.0, "render_match": 0.5, "render_skipped": 1,
    "render_failed": 2,
}  # fmt: skip
HOSTILE = (
    "</dd><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>\u202e\x00\ud83d"
)
FORMULAS = [r"\frac{a}{b}", r"x^{2}", r"\alpha+1"]


def stage(name: str, summary: dict[str, Any]) -> StageRecord:
    return StageRecord(
        name=name, fingerprint="f" * 64, started="2026-01-02T03:04:05Z", seconds=2.5, files=(),
        summary=summary,
    )  # fmt: skip


def prediction(row: str, label: str, answer: str) -> dict[str, Any]:
    found = score(answer, label, "latex")
    return {
        "id": row, "label": label, "prediction": answer, "render": "differs",
        "score": {"cer": found.cer, "exact_match": found.exact_match,
                  "exact_match_normalized": found.exact_match_normalized},
    }  # fmt: skip


# Labels with the answers before and after training, as each kind of task has them.
TASKS: dict[Answer, list[tuple[str, str, str]]] = {
    "text": [
        ("Serial 10482-C", "Serial 10482-C", "Seri"),
        ("Invoice no. 5 of New York", "Invoice no. 5 of NewYork", "5"),
        ("Total  12.50", "Total 12.50", ""),
        ("Ends in the middle", "Ends in the mid", "x"),
    ],
    "json": [
        ('{"shop": "Aldi", "total": 5.5}', '{"total": 5.50, "shop": "Aldi"}', "shop Aldi"),
        ('{"shop": "Lidl", "total": 7}', '{"shop": "Lidl", "total": 1}', '{"shop": "Aldi"}'),
        ('{"shop": "Spar", "total": 3}', '{"shop": "Spar", "total"', "{}"),
        ("no JSON", "{}", ""),
    ],
    "label": [
        *[("invoice", "invoice", "letter")] * 4,
        *[("letter", "letter", "letter")] * 3,
        ("receipt", "invoice", "letter"),
        ("receipt", "a receipt", "letter"),
    ],
}


def of_task(kind: Answer, *, conversations: bool = False) -> RunResults:
    """A run's results on a task of that kind, with one image per row; in conversations with two, a
    system message and two answers per row."""
    triples = TASKS[kind]
    judged = [
        score_answers(kind, [triple[at] for triple in triples], [triple[0] for triple in triples],
              kinds.METRICS[kind])
        for at in (1, 2)
    ]  # fmt: skip
    rows: list[Row] = []
    after: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    a_row = 2 if conversations else 1
    system = Message(role="system", parts=(Part(text="Answer in one line."),))
    for start in range(0, len(triples), a_row):
        messages: list[Message] = [system] if conversations else []
        number = start // a_row
        for turn, triple in enumerate(triples[start : start + a_row], start=1):
            shown = [Part(image=0), Part(image=1)][:a_row] if turn == 1 else []
            messages.append(Message(role="user", parts=(*shown, Part(text="What is it?"))))
            messages.append(Message(role="assistant", parts=(Part(text=triple[0]),)))
        row = Row(
            id=f"rows.jsonl:{number}", messages=tuple(messages),
            images=tuple(png(2 * number + at) for at in range(a_row)),
        )  # fmt: skip
        rows.append(row)
        for turn, question in enumerate(questions([row], "all")):
            at = start + turn
            common = {
                "id": row.id, "row": number, "turn": question.turn, "asked": question.to_json(),
                "label": question.label, "render": None,
            }  # fmt: skip
            for found, judged_all, text in ((after, judged[0], 1), (before, judged[1], 2)):
                cut = text == 1 and triples[at][1].endswith(" mid")
                found.append(
                    {**common, "prediction": triples[at][text], "cut_short": cut,
                     "score": judged_all.scores[at]}
                )  # fmt: skip
    made = results(after)
    settings = json.loads(json.dumps(made.settings))
    settings["eval"] |= {"answer": kind, "metrics": None}
    summaries = [
        {
            "metrics": {"loss": loss, "rows": len(rows), **each.metrics, **each.counts},
            "rows": len(rows), "answers": len(after), "max_new_tokens": 40,
            "cut_short": cut, "cannot_be_right": 0, "generated_tokens_per_second": 10.0,
        }
        for each, loss, cut in ((judged[0], 0.7, int(kind == "text")), (judged[1], 5.0, 0))
    ]  # fmt: skip
    stages = {
        **made.stages,
        "baseline": stage("baseline", summaries[1]),
        "eval": stage("eval", summaries[0]),
    }
    return replace(made, settings=settings, stages=stages, before=before, after=after, rows=rows)


def png(seed: int = 0, size: tuple[int, int] = (120, 40)) -> EncodedImage:
    from PIL import Image

    pixels = random.Random(seed).randbytes(size[0] * size[1] * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(out, "PNG")
    return EncodedImage(data=out.getvalue(), width=size[0], height=size[1])


def asked(found: RunResults, image: EncodedImage) -> list[Row]:
    """The rows that the predictions answer, all with the same image."""
    question = Message(role="user", parts=(Part(image=0), Part(text="Read it.")))
    answer = Message(role="assistant", parts=(Part(text="label"),))
    return [
        Row(id=str(row["id"]), messages=(question, answer), images=(image,)) for row in found.after
    ]


def statistics() -> Statistics:
    """Statistics of forty rows, one image each."""
    found = Statistics(rows=40, images=40, characters=500, longest=90, pixels=40 * 9000)
    found.largest = 20_000
    found.by_characters.update({4: 12, 8: 20, 16: 7, 64: 1})
    found.by_pixels.update({4096: 10, 8192: 29, 16384: 1})
    return found


def results(predictions: list[dict[str, Any]] | None = None) -> RunResults:
    """A complete run's results, without images."""
    text = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
    loaded = load_spec(text, "latex.yaml", environ={})
    after = predictions or [prediction(f"rows.jsonl:{i}", f, f) for i, f in enumerate(FORMULAS)]
    rows = {"train": 40, "eval": 3, "rejected": 1, "leaked": 2}
    train = {
        "steps": 4, "processes": 1, "rows_a_step": 4, "resumed_from_step": 0, "epochs": 0.5,
        "rows": 40, "dropped_rows": 0, "first_loss": 6.0, "final_loss": 2.0,
        "tokens": 1234, "tokens_per_second": 99.0,
        "data_wait_seconds": 0.02, "data_wait_share": 0.05,
        "peak_memory_bytes": 2**30, "trainable_parameters": 10, "total_parameters": 1000,
    }  # fmt: skip
    stages = {
        "prep": stage("prep", {"rows": rows}),
        "baseline": stage("baseline", {"metrics": {**METRICS, "loss": 6.0, "cer": 2.0}}),
        "train": stage("train", train),
        "eval": stage("eval", {"metrics": METRICS, "generated_tokens_per_second": 10.0}),
    }
    return RunResults(
        name="formulas",
        settings=loaded.resolved,
        changed=loaded.changed,
        stages=stages,
        inputs={"model": {"uri": "builtin://ernie-vl-tiny", "digest": "d" * 64}},
        versions={"torch": "2"},
        history=[{"step": i, "loss": 6 / i, "learning_rate": 1e-3 / i} for i in range(1, 40)],
        before=[{**found, "prediction": "y", "score": {"cer": 1.0}} for found in after],
        after=after,
        rows=None,
        rejects=[{"id": "rows.jsonl:9", "reason": "the answer is empty"}],
        statistics={"train": statistics().summary()},
        lengths=lengths(Counter({60: 25, 64: 8, 131: 6, 4000: 1}), 512),
    )

"""The quantities of a job that its stages' times depend on: as planned, and as the run had them."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLAN_SECONDS = 300


def planned(spec: str, settings: Sequence[str]) -> dict[str, Any] | None:
    """The `work` and `job_time` of the job's plan; None if there is no plan."""
    command = [sys.executable, "-m", "job", "plan", spec, "--format", "json"]
    for setting in settings:
        command += ["--set", setting]
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=ROOT, capture_output=True, text=True, timeout=PLAN_SECONDS
        )
        plan = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        print(f"no plan: {error}", flush=True)
        return None
    return {key: plan.get(key) for key in ("work", "job_time")}


def measured(
    planned: Mapping[str, Any], summaries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The planned quantities, with those that the stages' summaries know replaced."""
    work = dict(planned)
    if "prep" in summaries:
        rows = summaries["prep"]["rows"]
        splits = [rows.get(name, 0) for name in ("train", "eval", "validation")]
        work |= {"train_rows": splits[0], "prep_rows": sum(splits)}
    evaluation = summaries.get("eval") or summaries.get("baseline")
    if evaluation:
        generated = evaluation["generated_tokens_per_second"] * evaluation["seconds"]
        answers = evaluation["answers"]
        work |= {"answers": answers, "new_tokens": round(generated / max(answers, 1), 1)}
    if "train" in summaries:
        train = summaries["train"]
        computing = train.get("computing", {})
        passes = computing.get("passes_a_step", work["passes"] / max(work["steps"], 1))
        work |= {
            "steps": train["steps"],
            "passes": round(train["steps"] * passes),
            "tokens": round(train["tokens"] / train["processes"]),
            "trainable": train["trainable_parameters"],
            "compiled": bool(computing.get("torch_compile", work["compiled"])),
        }
    if "export" in summaries:
        work["merged_bytes"] = summaries["export"].get("bytes", 0)
    return work

"""What makes a result doubtful: a model that is right nowhere, or no better than before."""

from collections.abc import Mapping

from job.evaluation.report.headline import headline
from job.spec.answer_kinds import RIGHT


def doubts(before: Mapping[str, float] | None, after: Mapping[str, float]) -> tuple[str, ...]:
    """A sentence for each doubt about metrics `after` training; `before` is None if unmeasured."""
    found = list[str]()
    compared = [metric for metric in headline(before, after) if metric.verdict is not None]
    if compared and not any(metric.verdict == "better" for metric in compared):
        found.append("the trained model is better by no metric than the one before training")
    telling = next((key for key in ("render_match", *RIGHT) if key in after), None)
    if telling is not None and after[telling] == 0:
        found.append(
            f"the trained model answers no held-out row correctly ({telling} is 0): "
            "it may need more steps"
        )
    return tuple(found)

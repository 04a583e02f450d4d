"""Renders `report.html`: a run's results on one self-contained page.

The page has no scripts and makes no network requests; its Content-Security-Policy forbids both. It
is deterministic: the same results give the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.artifacts.records import StageRecord
from job.evaluation.report import facts
from job.evaluation.report.charts import charts
from job.evaluation.report.distributions import histograms
from job.evaluation.report.doubts import doubts
from job.evaluation.report.embedded_images import ImageEmbedder
from job.evaluation.report.environment import environment
from job.evaluation.report.generated_text import plain
from job.evaluation.report.headline import headline
from job.evaluation.report.reward_curves import reinforcement
from job.evaluation.report.samples import PredictionRecord, SampleBuilder, choose
from job.evaluation.report.tables import table
from job.prep.rows import Row
from job.spec.answer_kinds import Answer

REPORT = "report.html"
MAX_BYTES = 2_000_000
"""The page's size limit."""

_SECTIONS = (
    "model",
    "data",
    "lora",
    "train",
    "reinforce",
    "eval",
    "export",
)  # not where the run took place
_SAMPLES, _WORST = 12, 6
_IMAGE_BYTES = 1_000_000  # for all images together; base64 adds a third
_REJECTS = 20


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """A run's results, from its stages' outputs."""

    name: str
    settings: Mapping[str, Any]
    """The resolved spec, with the names of variables in place of secrets."""
    changed: Sequence[str]
    """Dotted keys of `settings` that differ from their defaults."""
    stages: Mapping[str, StageRecord]
    inputs: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]
    history: Sequence[Mapping[str, Any]]
    before: Sequence[PredictionRecord]
    """Empty without a baseline."""
    after: Sequence[PredictionRecord]
    rows: Sequence[Row] | None
    """The held-out rows, for their images; predictions refer to them by number."""
    rejects: Sequence[Mapping[str, str]]
    statistics: Mapping[str, Any] | None = None
    """`data/stats.json`."""
    lengths: Mapping[str, Any] | None = None
    """`train/lengths.json`."""
    reinforced: Sequence[Mapping[str, Any]] = ()
    """`reinforced/history.jsonl`."""
    samples: Sequence[Mapping[str, Any]] = ()
    """`reinforced/samples.jsonl`."""


def render(results: RunResults) -> str:
    """The page as HTML, with as many samples as fit into `MAX_BYTES`."""
    samples, worst, image_bytes = _SAMPLES, _WORST, _IMAGE_BYTES
    while True:
        page = _page(results, samples, worst, image_bytes)
        if len(page.encode()) <= MAX_BYTES:
            return page
        assert samples or worst or image_bytes, "a page without samples is small"
        samples, worst, image_bytes = samples // 2, worst // 2, image_bytes // 2


def _page(results: RunResults, samples: int, worst: int, image_bytes: int) -> str:
    stages = results.stages
    baseline = stages["baseline"].summary if "baseline" in stages else None
    before = None if baseline is None else baseline["metrics"]
    after = stages["eval"].summary["metrics"]
    embedder = ImageEmbedder(budget=image_bytes)
    kind: Answer = results.settings["eval"]["answer"]
    spaced_indices, worst_indices = choose(results.after, samples, worst, kind)
    builder = SampleBuilder.of(kind, results.before, results.after, results.rows)
    shown = {
        "samples": builder.samples(spaced_indices, embedder),
        "worst": builder.samples(worst_indices, embedder),
    }
    return environment().get_template("page.html.jinja").render(
        results=results,
        **{name: stages[name].summary for name in ("prep", "train", "eval")},
        export=stages["export"].summary if "export" in stages else None,
        metrics=headline(before, after),
        doubts=doubts(before, after),
        kind=kind,
        question=None if builder.shared_question is None else plain(builder.shared_question),
        counts=facts.counts(baseline, stages["eval"].summary),
        bands=facts.bands(results.before, results.after) if kind in ("text", "latex") else None,
        task=table(kind, results.before, results.after),
        charts=charts(results.history, stages["train"].summary.get("validation")),
        validation=facts.validation(
            stages["train"].summary, reinforced="reinforce" in stages
        ),
        times=facts.times(stages),
        settings=facts.settings(results.settings, results.changed, _SECTIONS),
        rejects=results.rejects[:_REJECTS],
        histograms=histograms(results.statistics, results.lengths),
        reinforcement=reinforcement(
            stages["reinforce"].summary if "reinforce" in stages else None,
            results.reinforced,
            results.samples,
        ),
        images_omitted=embedder.omitted,
        **shown,
    )  # fmt: skip

"""`report.html`: what a run did to a model, on one page that opens anywhere.

The page is one file without scripts and without a request to any network, and its own policy
allows neither. It says nothing that depends on when or where it is made, so the same results give
the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import log, redaction
from job.artifacts.records import StageRecord
from job.evaluation.report import facts
from job.evaluation.report.charts import charts
from job.evaluation.report.distributions import histograms
from job.evaluation.report.generated_text import plain, visible
from job.evaluation.report.samples import Album, Prediction, Subject, choose
from job.evaluation.report.tables import table
from job.prep.rows import Row
from job.spec.answer_kinds import Answer

REPORT = "report.html"
LARGEST = 2_000_000
"""Bytes that a page never passes."""

_HERE = Path(__file__).parent
_SECTIONS = ("model", "data", "lora", "train", "eval", "export")  # not where it ran
_SAMPLES, _WORST = 12, 6
_PICTURES = 1_000_000  # bytes of all pictures together; base64 adds a third
_REJECTS = 20


@dataclass(frozen=True, kw_only=True)
class Reported:
    """The results of a run, read from what its stages left."""

    name: str
    settings: Mapping[str, Any]
    """The resolved spec, secrets by their names."""
    changed: Sequence[str]
    """Dotted keys of `settings` that differ from their defaults."""
    stages: Mapping[str, StageRecord]
    inputs: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]
    history: Sequence[Mapping[str, Any]]
    before: Sequence[Prediction]
    """Empty where there is no baseline."""
    after: Sequence[Prediction]
    rows: Sequence[Row] | None
    """The held-out rows, for their images; predictions name them by their number."""
    rejects: Sequence[Mapping[str, str]]
    statistics: Mapping[str, Any] | None = None
    """Prep's, of all rows."""
    lengths: Mapping[str, Any] | None = None
    """In tokens, as training measured them."""


def make(results: Reported) -> str:
    """The page as HTML, of at most `LARGEST` bytes: samples are left out before it grows past."""
    count, worst, pictures = _SAMPLES, _WORST, _PICTURES
    while True:
        page = _page(results, count, worst, pictures)
        if len(page.encode()) <= LARGEST:
            return page
        assert count or worst or pictures, "a page without samples is small"
        count, worst, pictures = count // 2, worst // 2, pictures // 2


def _page(results: Reported, count: int, worst: int, pictures: int) -> str:
    stages = results.stages
    album = Album(left=pictures)
    kind: Answer = results.settings["eval"]["answer"]
    evenly, last = choose(results.after, count, worst, kind)
    subject = Subject.of(kind, results.before, results.after, results.rows)
    shown = {
        "samples": subject.samples(evenly, album),
        "worst": subject.samples(last, album),
    }
    return _environment().get_template("page.html.jinja").render(
        results=results,
        **{name: stages[name].summary for name in ("prep", "train", "eval")},
        export=stages["export"].summary if "export" in stages else None,
        metrics=facts.headline(
            stages["baseline"].summary["metrics"] if "baseline" in stages else None,
            stages["eval"].summary["metrics"],
        ),
        kind=kind,
        question=None if subject.alike is None else plain(subject.alike),
        counts=facts.counts(
            stages["baseline"].summary if "baseline" in stages else None, stages["eval"].summary
        ),
        bands=facts.bands(results.before, results.after) if kind in ("text", "latex") else None,
        task=table(kind, results.before, results.after),
        charts=charts(results.history),
        times=facts.times(stages),
        settings=facts.settings(results.settings, results.changed, _SECTIONS),
        rejects=results.rejects[:_REJECTS],
        histograms=histograms(results.statistics, results.lengths),
        pictures_left_out=album.refused,
        **shown,
    )  # fmt: skip


def _environment() -> Any:
    """Templates that escape everything, and show no secret and no hidden character."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def safe(value: Any) -> Any:
        # Markup is what this package drew itself.
        return visible(redaction.redact(value)) if type(value) is str else value

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((_HERE / "page.css").read_text(encoding="utf-8"))  # noqa: S704
    environment.filters |= {"size": log.size, "amount": facts.amount}
    return environment

"""`job plan`: what a run would do and require. Reads headers and a few rows, no weights.

Imports: spec, storage, prep, families, engines, train, evaluation, pipeline, reinforce.
"""

from job.planning.name_patterns import patterns
from job.planning.plan import PlanOptions, make_plan
from job.planning.refusal import refuse_if_too_large, refuse_missing_data
from job.planning.text import as_json, text

__all__ = [
    "PlanOptions",
    "as_json",
    "make_plan",
    "patterns",
    "refuse_if_too_large",
    "refuse_missing_data",
    "text",
]

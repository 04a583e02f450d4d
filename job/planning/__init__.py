"""`job plan`: what a run would do, from headers and a sample: no weights, no training, no GPU.

Imports: spec, storage, prep, families, engines, train, evaluation, pipeline.
"""

from job.planning.gather import Order, make
from job.planning.name_patterns import patterns
from job.planning.refusal import refuse_missing_data, refuse_what_does_not_fit
from job.planning.text import as_json, text

__all__ = [
    "Order",
    "as_json",
    "make",
    "patterns",
    "refuse_missing_data",
    "refuse_what_does_not_fit",
    "text",
]

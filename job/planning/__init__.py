"""`job plan`: what a run would do, from headers and a sample: no weights, no training, no GPU."""

from job.plan.make import Order, make
from job.plan.patterns import patterns
from job.plan.refusal import refuse_missing_data, refuse_what_does_not_fit
from job.plan.text import as_json, text

__all__ = [
    "Order",
    "as_json",
    "make",
    "patterns",
    "refuse_missing_data",
    "refuse_what_does_not_fit",
    "text",
]

"""`job init`: drafts a spec for a user's rows, from their columns, answers and lengths.

Imports: spec, storage, prep, families, evaluation.
"""

from job.drafting.draft import Draft, DraftOptions, make_draft
from job.drafting.names import NO_NAME, as_name, job_name
from job.drafting.spec_text import spec_text

__all__ = ["NO_NAME", "Draft", "DraftOptions", "as_name", "job_name", "make_draft", "spec_text"]

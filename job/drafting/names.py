"""A job's name, from the URI of its data."""

import re

MAX_LENGTH = 52
_GENERIC = re.compile(
    r"(rows?|data|dataset|train(ing)?|metadata|labels?|annotations?|images?|list|samples?|all)?"
    r"[-_.\d]*(of[-_.\d]*)?"
)
"""Names that do not say what the data is, with the numbers of parts."""


def as_name(text: str) -> str:
    """The text as a job name; empty if nothing of it can be in one."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_LENGTH].strip("-")


def job_name(uri: str) -> str:
    """A valid job name: `receipts` for `data/receipts/train.jsonl`."""
    path = uri.partition("://")[2] if "://" in uri else uri
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for part in reversed(parts):
        stem = re.sub(r"(\.(gz|[a-z]{2,8}))+$", "", part.lower())
        name = as_name(stem)
        if name and not re.search(r"[*?\[{]", part) and not _GENERIC.fullmatch(stem):
            return name
    return "my-job"

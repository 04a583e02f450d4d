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


NO_NAME = "my-job"
"""The name if the data has none that a job could have."""


def job_name(uri: str) -> str:
    """A valid job name: `receipts` for `data/receipts/train.jsonl`, but `list` for `list`: a name
    that does not say what the data is, if no other is there."""
    path = uri.partition("://")[2] if "://" in uri else uri
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    generic = list[str]()
    for part in reversed(parts):
        stem = re.sub(r"(\.(gz|[a-z]{2,8}))+$", "", part.lower())
        name = as_name(stem)
        if not name or re.search(r"[*?\[{]", part):
            continue
        if not _GENERIC.fullmatch(stem):
            return name
        if not re.search(r"\d", stem):
            generic.append(name)
    return next(iter(generic), NO_NAME)

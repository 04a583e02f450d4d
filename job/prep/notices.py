"""Log lines about prepared rows: image counts, skipped files, ignored columns, shares."""

from collections import Counter
from collections.abc import Mapping, Sequence

from job import log
from job.prep.mixture import SourceShare
from job.prep.shards import Split
from job.prep.source_files import DataSource
from job.prep.statistics import Statistics

MAX_COLUMNS = 20


def log_skipped_files(
    labels: Sequence[str], sources: Sequence[DataSource], junk_members: Counter[str]
) -> dict[str, dict[str, int]]:
    """Logs which files of each source are skipped; returns their counts by reason."""
    counts_by_source = {}
    for label, source in zip(labels, sources, strict=True):
        counts = {reason: skipped.files for reason, skipped in source.skipped.items()}
        for reason, skipped in source.skipped.items():
            log.info(f"skipped: {reason}", source=label, files=skipped.files, first=skipped.first)
        if junk_members[label]:
            reason = "members of archives left there by systems and tools"
            counts[reason] = junk_members[label]
            log.info(f"skipped: {reason}", source=label, members=counts[reason])
        if counts:
            counts_by_source[label] = counts
    return counts_by_source


def log_given_system(statistics: Mapping[Split, Statistics]) -> None:
    """Logs how many rows get the spec's system prompt; warns if all have their own."""
    given = {
        f"{split}_rows": log.fraction(s.given_system, s.rows) for split, s in statistics.items()
    }
    if any(each.given_system for each in statistics.values()):
        log.info("data.system is put before rows without a system prompt of their own", **given)
    else:
        log.warn("data.system is not used: every row has a system prompt of its own", **given)


def log_image_counts(statistics: Mapping[Split, Statistics]) -> None:
    for split, figures in statistics.items():
        log.info(
            f"images of {split} rows",
            rows=figures.rows,
            images=figures.images,
            **{f"{name}_a_row": n for name, n in figures.summary()["images_per_row"].items()},
            rows_without=figures.without_image,
        )
    train = statistics["train"]
    for split, figures in statistics.items():
        if train.images and figures.rows and not figures.images:
            name = "held-out" if split == "eval" else split
            log.warn(f"training rows have images, but no {name} row does")


def log_ignored_columns(ignored: Mapping[str, Counter[str]]) -> None:
    """Logs which columns of each source are ignored, and in how many rows they have a value."""
    for label, counts in ignored.items():
        if counts:
            shown = [f"{name} ({rows})" for name, rows in counts.most_common(MAX_COLUMNS)]
            more = [f"and {len(counts) - MAX_COLUMNS} more"] if len(counts) > MAX_COLUMNS else []
            log.info("ignored columns", source=label, rows=", ".join([*shown, *more]))


def log_shares(shares: Sequence[SourceShare]) -> None:
    total = sum(share.trained for share in shares)
    for share in shares:
        log.info(
            share.source,
            uri=share.uri,
            rows=share.rows,
            trained=share.trained,
            share=f"{share.trained / total:.1%}",
            held_out=share.held_out,
            **({} if share.validation is None else {"validation": share.validation}),
        )

"""What prep says of its rows beside rejects: their images, and what made no row or is not read."""

from collections import Counter
from collections.abc import Mapping, Sequence

from job import log
from job.prep.discovery import ORPHANS, StagedSource
from job.prep.shards import Split
from job.prep.statistics import Statistics

MOST_COLUMNS = 20


def passed_over(
    labels: Sequence[str], staged: Sequence[StagedSource], members: Counter[str]
) -> dict[str, dict[str, int]]:
    """Says what files of each source make no row, and gives their numbers by why not."""
    found = {}
    for label, source in zip(labels, staged, strict=True):
        counts = {why: passed.files for why, passed in source.passed_over.items()}
        for why, passed in source.passed_over.items():
            tell = log.warn if why == ORPHANS else log.info
            tell(f"passed over: {why}", source=label, files=passed.files, first=passed.first)
        if members[label]:
            why = "members of archives left there by systems and tools"
            counts[why] = members[label]
            log.info(f"passed over: {why}", source=label, members=counts[why])
        if counts:
            found[label] = counts
    return found


def tell_images(statistics: Mapping[Split, Statistics]) -> None:
    for split, kept in statistics.items():
        figures = kept.summary()
        log.info(
            f"images of {split} rows",
            rows=kept.rows,
            images=kept.images,
            **{f"{name}_a_row": n for name, n in figures["images_per_row"].items()},
            rows_without=kept.without_image,
        )
    train, held_out = statistics["train"], statistics["eval"]
    if train.images and held_out.rows and not held_out.images:
        log.warn("rows to train have images and no held-out row has one")


def tell_unread(unread: Mapping[str, Counter[str]]) -> None:
    """Says once what columns of a source are not read, and in how many rows they are."""
    for label, found in unread.items():
        if found:
            shown = [f"{name} ({rows})" for name, rows in found.most_common(MOST_COLUMNS)]
            more = [f"and {len(found) - MOST_COLUMNS} more"] if len(found) > MOST_COLUMNS else []
            log.info("columns that are not read", source=label, rows=", ".join([*shown, *more]))

"""`job clean`: lists or removes what runs and downloads left on this machine."""

from collections.abc import Sequence
from pathlib import Path

from job import log
from job.local import eviction, leftovers
from job.local.leftovers import DAY, Leftover
from job.redaction import redact
from job.spec import keys
from job.spec.load import LoadedSpec


def clean(
    loaded: LoadedSpec | None, cache_dir: Path | None, *, unused_days: float, remove: bool
) -> None:
    """Lists or removes the leftovers in the folders of the spec, or in the default ones.

    Raises InputError if some cannot be removed, after removing all others.
    """
    runtime = loaded.spec.runtime if loaded else None
    default = runtime.cache_dir if runtime else str(keys.default("runtime.cache_dir"))
    cache = (cache_dir or Path(default)).expanduser()
    work = cache / "work"
    if runtime is not None and runtime.workdir is not None:
        work = Path(runtime.workdir).expanduser()
    limit = eviction.parse_size(runtime.cache_limit if runtime else None)
    found = leftovers.scan(cache, work, unused_days=unused_days, limit=limit)
    removable = [each for each in found if each.removable]
    for each in found:
        _report(each)
    folders = f"{cache}" if work == cache / "work" else f"{cache} and {work}"
    if not remove:
        fix = {"fix": "run the same command with --remove"} if removable else {}
        log.info(
            "would be removed", folders=len(removable), size=_total(removable), below=folders, **fix
        )
        return
    removed, in_use = leftovers.remove(removable)
    log.info("removed", folders=len(removed), size=_total(removed), below=folders)
    for each in in_use:
        log.info("kept: a process started using it", folder=each.path)


def _report(found: Leftover) -> None:
    if log.is_json():
        log.info(
            "found",
            kind=found.kind,
            folder=found.path,
            size=log.byte_count(found.bytes),
            age=log.seconds(found.age_seconds),
            state=found.state,
            of=found.of or None,
        )
        return
    size, age = log.size(found.bytes), _age(found.age_seconds)
    line = f"{found.state:<7} {size:>10} {age:>9}  {found.kind:<9} {found.path}"
    print(redact(line + (f"  ({found.of})" if found.of else "")))


def _age(seconds: float) -> str:
    return f"{seconds / DAY:.0f} days" if seconds >= 2 * DAY else log.duration(seconds)


def _total(found: Sequence[Leftover]) -> log.Quantity:
    return log.byte_count(sum(each.bytes for each in found))

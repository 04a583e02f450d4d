"""The folder in which shards are built, kept so that an interrupted prep can resume."""

import shutil
from pathlib import Path

from job import log
from job.prep.chunks import SAMPLE
from job.prep.prepared_data import REJECTS
from job.prep.shards import ShardWriter, shard_paths
from job.prep.splits import splits_of
from job.prep.streaming import CHUNKS
from job.spec.types import DataSpec


def open_workspace(directory: Path, identity: str) -> Path:
    """The folder for the shards of `directory`; it keeps finished chunks of the same identity."""
    workspace = directory.parent.with_name(f"{directory.parent.name}.partial")
    stored = workspace / "identity"
    if not stored.exists() or stored.read_text() != identity:
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(parents=True)
        stored.write_text(identity)
    elif done := len(list(workspace.glob("*-*.json"))):
        log.info("resuming an interrupted prep", chunks_done=done)
    return workspace


def publish(workspace: Path, directory: Path, spec: DataSpec) -> None:
    """Moves the finished files to `directory`; a split without rows gets one empty shard."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (workspace / "identity").unlink()  # from here on prep cannot resume
    for split in splits_of(spec):
        for shard in shard_paths(workspace, split):
            shard.rename(directory / shard.name)
        if not shard_paths(directory, split):
            ShardWriter(directory / f"{split}-00000.arrow").close()
    for name in (REJECTS, *((CHUNKS, SAMPLE) if spec.streaming else ())):
        (workspace / name).rename(directory / name)
    shutil.rmtree(workspace)

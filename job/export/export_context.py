"""The inputs of the export stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from job.engines.base import Engine
from job.export.proof import PROBES
from job.families.base import Family
from job.prep.rows import Row
from job.spec.output_folders import MERGED
from job.spec.types import JobSpec
from job.storage.digests import FileDigest, digest_tree

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ExportContext:
    spec: JobSpec
    engine: Engine
    family: Family
    rows: Sequence[Row]
    """The held-out rows; the first few are the probes."""
    adapter: Path | None
    """The stored adapter; None after full fine-tuning."""
    directory: Path
    load_trained: "Callable[[], PeftModel | PreTrainedModel]"
    load_base: "Callable[[], PreTrainedModel]"
    """Called only if the trained model no longer contains the base weights, because all weights or
    the biases were trained."""
    release: Callable[[], None]
    """Frees the models in memory, before and after the merged one is loaded."""
    bind_merged: Callable[[Path], Family]
    on_shard_written: Callable[[Path], None] | None = None
    """Called with each finished shard, before the export is verified."""
    digest_tree: Callable[[Path], tuple[FileDigest, ...]] = digest_tree
    """The digests of all files in a folder, some of which are known by the time of the call."""

    @cached_property
    def probes(self) -> tuple[Row, ...]:
        """The rows on which models are compared."""
        return tuple(self.rows[:PROBES])

    @property
    def target(self) -> Path:
        return self.directory / MERGED

    @property
    def dtype_name(self) -> str:
        return self.spec.export.merged.dtype

    @property
    def dtype(self) -> "torch.dtype":
        """The merged weights' dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

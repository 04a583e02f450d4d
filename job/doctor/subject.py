"""The subject of the checks: the folders and requirements of a spec, or defaults without one."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from job.errors import JobError
from job.planning.requirements import Needs, needs
from job.planning.sizes import Sizes, measure
from job.planning.stored_rows import stored_bytes
from job.spec import keys
from job.spec.load import LoadedSpec
from job.spec.types import JobSpec


@dataclass(frozen=True, kw_only=True)
class Subject:
    spec: JobSpec | None
    accelerator: str
    cache_dir: Path
    workdir: Path

    @classmethod
    def of(cls, loaded: LoadedSpec | None) -> "Subject":
        spec = loaded.spec if loaded else None
        cache = Path(spec.runtime.cache_dir if spec else str(keys.default("runtime.cache_dir")))
        workdir = spec.runtime.workdir if spec else None
        return cls(
            spec=spec,
            accelerator=spec.runtime.accelerator if spec else "auto",
            cache_dir=cache.expanduser(),
            workdir=(Path(workdir) if workdir else cache / "work").expanduser(),
        )

    @property
    def uris(self) -> tuple[str, ...]:
        """The URIs that the spec names."""
        if self.spec is None:
            return ()
        sources = [source.uri for source in self.spec.data.sources().values()]
        model = self.spec.model
        adapter = (model.adapter_name_or_path,) if model.adapter_name_or_path else ()
        return (model.model_name_or_path, *adapter, *sources, self.spec.output.uri)

    def measured(self, gpus: int) -> tuple[Sizes, Needs] | None:
        """The sizes and requirements of the spec; None without one.

        Those of disk are for the rows as they are, if these are local.
        """
        if self.spec is None:
            return None
        needed = needs(self.spec, self._sizes, gpus=gpus, data_bytes=self.data_bytes)
        return self._sizes, needed

    @cached_property
    def data_bytes(self) -> int | None:
        """The size of the prepared rows; None if it is unknown, or without a spec."""
        if self.spec is None:
            return None
        try:
            return stored_bytes(self.spec.data)
        except JobError:
            return None  # the check of the rows reports why

    @cached_property
    def _sizes(self) -> Sizes:
        assert self.spec is not None
        return measure(self.spec)

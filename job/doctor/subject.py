"""The subject of the checks: the folders and requirements of a spec, or defaults without one."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from job.planning.requirements import Needs, needs
from job.planning.sizes import Sizes, measure
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
        """The sizes and requirements of the spec; None without one."""
        if self.spec is None:
            return None
        return self._sizes, needs(self.spec, self._sizes, gpus=gpus)

    @cached_property
    def _sizes(self) -> Sizes:
        assert self.spec is not None
        return measure(self.spec)

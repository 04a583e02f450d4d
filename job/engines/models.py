"""The model in memory: loaded when a stage first asks for it, shared by the stages after."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from job import log
from job.engines.base import Engine
from job.engines.device import release_memory
from job.families.base import Family
from job.spec.types import JobSpec


class Models:
    """One base model at a time, and on it the adapter that was trained."""

    def __init__(self, spec: JobSpec, engine: Engine, family: Family) -> None:
        self._spec, self._engine, self._family = spec, engine, family
        self._base: Any = None
        self._trained: Any = None

    def base(self) -> Any:
        """The model that training starts from."""
        if self._base is None:
            log.info("load model", init=self._spec.model.init, dtype=str(self._engine.dtype)[6:])
            self._base = (
                self._engine.initialise(self._family, self._spec.train.seed)
                if self._spec.model.init == "random"
                else self._engine.load(self._family)
            )
        return self._base

    def keep_trained(self, model: Any) -> None:
        """Hands over the model that training has just made out of the base."""
        self._trained, self._base = model, None

    def trained(self, adapter: Path | None, family_of_weights: Callable[[], Family]) -> Any:
        """The trained model: in memory, or the base with the stored adapter, or stored weights."""
        if self._trained is None:
            if adapter is not None:
                self._trained = self._engine.load_adapter(self.base(), adapter)
                self._base = None
            else:
                self._trained = self._engine.load(family_of_weights())
        return self._trained

    def release(self) -> None:
        """Lets go of every model, and of the GPU memory they held."""
        self._base = self._trained = None
        release_memory()

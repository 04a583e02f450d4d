"""The model in memory: loaded when a stage first needs it, and shared by later stages."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from job import log
from job.engines.base import Engine
from job.engines.device import release_memory
from job.engines.stored_adapter import StoredAdapter, with_adapter
from job.engines.unread import UnreadWeights
from job.families.base import Family
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Models:
    """Holds one model at a time: the base, or the base with the trained adapter."""

    def __init__(self, spec: JobSpec, engine: Engine, family: Family) -> None:
        self._spec, self._engine, self._family = spec, engine, family
        self._base: PreTrainedModel | None = None
        self._adapted: PeftModel | None = None
        self._unread: tuple[PreTrainedModel, UnreadWeights] | None = None
        self._trained: PreTrainedModel | PeftModel | None = None

    def base(self) -> "PreTrainedModel":
        """The model that training starts from."""
        self._remove_adapter()
        if self._base is None:
            log.info("load model", init=self._spec.model.init, dtype=str(self._engine.dtype)[6:])
            self._base = (
                self._engine.initialize(self._family, self._spec.train.seed)
                if self._spec.model.init == "random"
                else self._engine.load(self._family)
            )
        return self._base

    def to_train(self) -> "tuple[PreTrainedModel, UnreadWeights | None]":
        """The base in each process of a training, and its weights if they are not in memory yet.

        If a process may read its shards only, the base is released that was loaded before.
        """
        if not self._spec.reads_shards_only:
            return self.base(), None
        if self._unread is None:
            self.release()
            log.info("build model without weights", dtype=str(self._engine.dtype)[6:])
            model = self._engine.without_weights(self._family)
            self._unread = model, UnreadWeights(self._family, model)
        return self._unread

    def initial(self, stored: "StoredAdapter | None") -> "PreTrainedModel | PeftModel":
        """The base, or the base with an adapter, in evaluation mode.

        `base` restores the base itself, or loads it again if the adapter has changed it.
        """
        base = self.base()
        if stored is None:
            return base
        self._adapted = with_adapter(self._engine, base, stored)
        return self._adapted

    def keep_trained(self, model: "PreTrainedModel | PeftModel") -> None:
        """Keeps the trained model, which contains the base, for later stages."""
        self._trained, self._base = model, None

    def trained(
        self, adapter: Path | None, family_of_weights: Callable[[], Family]
    ) -> "PreTrainedModel | PeftModel":
        """The trained model: in memory already, or loaded: the base with the stored adapter or, if
        `adapter` is None, the stored weights."""
        if self._trained is None:
            if adapter is not None:
                self._trained = self._engine.load_adapter(self.base(), adapter)
                self._base = None
            else:
                self._trained = self._engine.load(family_of_weights())
        return self._trained

    def release(self) -> None:
        """Drops all models and frees their memory."""
        self._base = self._adapted = self._trained = self._unread = None
        release_memory()

    def _remove_adapter(self) -> None:
        """Removes the adapter of `initial`, or the base too if it holds trained weights."""
        adapted, self._adapted = self._adapted, None
        if adapted is None:
            return
        config = adapted.peft_config[adapted.active_adapter]
        if config.bias == "none" and not config.modules_to_save:
            self._base = adapted.unload()
        else:
            del adapted
            self._base = None
            release_memory()

"""Reads a checkpoint's weights one by one, in any order, by the names of the model.

A merge needs the original of each packed weight: what is left of it in 4 bits is another model. A
process that shards a model reads its rows of each weight.
Names are matched, and tensors fused, by Transformers' own conversions, as when the model is loaded.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from job.errors import InputError
from job.families import weight_files

if TYPE_CHECKING:
    from safetensors import safe_open
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class _Source:
    """The stored tensors of one of the model's weights, or of several that are stored as one."""

    name: str
    converter: WeightConverter | None
    stored: list[tuple[str, str]] = field(default_factory=list)
    """Each one's name, and the pattern of the converter that matches it."""


class StoredWeights:
    """The weights of the checkpoint in a folder; a context manager, which closes its files."""

    def __init__(self, uri: str, directory: Path, skeleton: "PreTrainedModel") -> None:
        """`skeleton` is the architecture on the meta device."""
        self._uri, self._skeleton, self._files = uri, skeleton, ExitStack()
        self._file_of: dict[str, safe_open] = {}
        self._sources: dict[str, _Source] = {}
        self._siblings: dict[str, torch.Tensor] = {}
        """Weights that were computed with the last one, because they are stored as one."""
        self._directory = directory
        self.conversions: Sequence[Any] = ()
        """Transformers' conversions that match a stored tensor: writing the model reverts them."""

    def __enter__(self) -> Self:
        from safetensors import safe_open

        for path in weight_files.checkpoint_files(self._uri, self._directory):
            file = self._files.enter_context(safe_open(path, framework="pt"))
            self._file_of |= dict.fromkeys(file.keys(), file)
        self._match_names()
        return self

    def __exit__(self, *_: object) -> None:
        self._siblings.clear()
        self._files.close()

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The weight with this name in the model. Raises InputError if there is none."""
        if (found := self._siblings.pop(name, None)) is not None:
            return found.to(device, dtype)
        self._siblings.clear()
        source = self._sources.get(name)
        if source is None:
            raise InputError(self._uri, f"has no tensor for {name}", fix="copy it whole")
        if source.converter is None:
            [(stored, _)] = source.stored
            return self._load(stored, dtype, device)
        converter = copy.deepcopy(source.converter)
        for stored, pattern in source.stored:
            converter.add_tensor(
                source.name, stored, pattern, partial(self._load, stored, dtype, device)
            )
        results = converter.convert(source.name, model=self._skeleton, config=self._skeleton.config)
        self._siblings = {
            each: (value[0] if isinstance(value, list) else value)
            for each, value in results.items()
        }
        return self._siblings.pop(name)

    def rows(
        self,
        name: str,
        first: int,
        last: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """The rows `first` to `last` of the weight, which is read whole only if it is converted.

        Raises InputError if there is no such weight, or if the whole one has another `shape`.
        """
        source = self._sources.get(name)
        if source is None or source.converter is not None:
            whole = self.read(name, dtype, device)
            self._require_shape(name, tuple(whole.shape), shape)
            return whole[first:last].clone()
        [(stored, _)] = source.stored
        slices = self._file_of[stored].get_slice(stored)
        self._require_shape(name, tuple(slices.get_shape()), shape)
        if first == last:  # which safetensors refuses to read
            return torch.empty((0, *shape[1:]), dtype=dtype, device=device)
        rows: torch.Tensor = slices[first:last]
        return rows.to(device, dtype)

    def _require_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise InputError(
                self._uri,
                f"its {name} is {list(found)} instead of {list(expected)}",
                fix="check that the checkpoint was copied whole and belongs to its config.json",
            )

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape in its file; None if there is no such weight, or if it is converted."""
        source = self._sources.get(name)
        if source is None or source.converter is not None:
            return None
        [(stored, _)] = source.stored
        return tuple(self._file_of[stored].get_slice(stored).get_shape())

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    @property
    def unknown(self) -> list[str]:
        """Names of weights that the model does not have."""
        return sorted(self._sources.keys() - self._skeleton.state_dict().keys())

    def grouped(self, names: Iterable[str]) -> list[str]:
        """The names, with those next to each other that are stored as one: it is read once."""
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(id(self._sources.get(name)), []).append(name)
        return [name for group in groups.values() for name in group]

    def _load(self, stored: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[stored].get_tensor(stored)
        return tensor.to(device, dtype)

    def _match_names(self) -> None:
        """Finds the weight of each stored tensor, as Transformers' loader does."""
        model, state = self._skeleton, self._skeleton.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        rename: Callable[..., tuple[str, str | None]] = partial(
            rename_source_key, base_model_prefix=model.base_model_prefix, meta_state_dict=state
        )
        for stored in sorted(self._file_of, key=dot_natural_key):
            name, pattern = rename(stored, renamings, converters)
            if name not in state and stored in state:
                name, pattern = rename(stored, [], [])
            converter = None if pattern is None else by_pattern[pattern]
            source = self._sources.setdefault(name, _Source(name=name, converter=converter))
            source.stored.append((stored, pattern or stored))
        self.conversions = [each for each in mapping if each.was_used()]
        for source in list(self._sources.values()):
            targets = [] if source.converter is None else source.converter.target_patterns
            for other in targets[1:]:
                self._sources[source.name.replace(targets[0], other)] = source

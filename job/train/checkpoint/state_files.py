"""Stores the states of optimizers, schedulers and random generators without pickles.

Tensors go into safetensors, everything around them into JSON: numbers, text, None, lists, tuples
and dictionaries with any of these as keys. Values are read back with the same types.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TENSORS, STRUCTURE = ".safetensors", ".json"


def save(state: Mapping[Any, object], stem: Path) -> None:
    """Stores `state` as `stem`.safetensors and `stem`.json.

    Raises TypeError for a value that neither format can hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _encode(state, "state", tensors)
    save_file(tensors, stem.with_suffix(TENSORS))
    text = json.dumps(structure, separators=(",", ":"))
    stem.with_suffix(STRUCTURE).write_text(text + "\n", encoding="utf-8")


def load(stem: Path, *, meta: bool = False) -> dict[Any, Any]:
    """Reads what `save` stored; tensors are on the CPU, or with `meta` shapes and dtypes only.

    Raises KeyError if the JSON names a tensor that the safetensors file lacks.
    """
    path = stem.with_suffix(TENSORS)
    tensors = headers(path) if meta else load_file(path)
    structure = json.loads(stem.with_suffix(STRUCTURE).read_text(encoding="utf-8"))
    state = _decode(structure, tensors)
    if not isinstance(state, dict):
        raise TypeError(f"{stem.name} holds no dictionary")
    return state


def value_of(text: str, key: str) -> object:
    """The number or text at `key` of a stored dictionary's JSON; None if there is none.

    Raises ValueError if `text` is not such a JSON.
    """
    match json.loads(text):
        case ["dict", list() as entries] if all(isinstance(each, list) for each in entries):
            return next((each[1] for each in entries if each[:1] == [key]), None)
    raise ValueError("it holds no dictionary")


def headers(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file on the meta device; reads no contents."""
    with safe_open(path, framework="pt") as file:
        return {name: _header(file, name) for name in file.keys()}  # noqa: SIM118 - no mapping


def _header(file: safe_open, name: str) -> torch.Tensor:
    part = file.get_slice(name)
    shape = part.get_shape()
    read = part[:0] if shape else file.get_tensor(name)  # no element, only the dtype
    return torch.empty(shape, dtype=read.dtype, device="meta")


def _encode(value: object, name: str, tensors: dict[str, torch.Tensor]) -> object:
    """The JSON for `value`; every container and tensor is a pair of kind and content."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case torch.Tensor():
            # A copy: safetensors rejects tensors that share storage.
            tensors[name] = value.detach().cpu().clone().contiguous()
            return ["tensor", name]
        case np.ndarray():
            tensors[name] = torch.from_numpy(value.copy())
            return ["array", name]
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return [kind, [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]]
        case dict():
            return [
                "dict",
                [
                    [_encode(k, "", {}), _encode(v, f"{name}.{k}", tensors)]
                    for k, v in value.items()
                ],
            ]
        case _:
            raise TypeError(f"{name}: a checkpoint cannot hold a {type(value).__name__}")


def _decode(value: object, tensors: dict[str, torch.Tensor]) -> object:
    if not isinstance(value, list):
        return value
    kind, content = value
    match kind:
        case "tensor":
            return tensors[content]
        case "array":
            return tensors[content].numpy()
        case "dict":
            return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
        case _:
            items = [_decode(each, tensors) for each in content]
            return items if kind == "list" else tuple(items)

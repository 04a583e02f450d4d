"""Names of an adapter's tensors: what other tools and versions write, to this model's modules.

A name has three parts: the path of a module, what the tensor is to it, and decorations that depend
on the writer: PEFT's prefix, an adapter's name, wrappers of DDP, FSDP and `torch.compile`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

PREFIX = "base_model.model."
"""PEFT's, before the name of a module."""
BASE_LAYER = ".base_layer"
"""PEFT's name for what an adapter wraps; part of the path if several adapters wrap one module."""

Part = Literal["lora_A", "lora_B", "lora_magnitude_vector"]

_DECORATION = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_LORA = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.(?!weight$|bias$)\w+)?(\.weight)?"
)
_SAVED = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)\w+(?=\.))?(?=\.)")
_OTHER_LORA = re.compile(r"\.lora_[A-Za-z]")

Renaming = tuple[tuple[re.Pattern[str], str], ...]


def _renaming(*pairs: tuple[str, str]) -> Renaming:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_LAYERS = r"(?=(layers|embed_tokens|norm)\b)"
RENAMINGS: Mapping[str, Renaming] = {
    "as they are": (),
    "the published names of ERNIE-4.5-VL": _renaming(
        (rf"^model\.{_LAYERS}", "model.language_model."),
        (r"^vision_model\.", "model.vision_tower."),
        (r"(?<=_linear)\.0\b", ".fc1"),
        (r"(?<=_linear)\.2\b", ".fc2"),
        (r"(?<=_linear)\.3\b", ".ln"),
    ),
    "the names of Transformers before 4.52": _renaming(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head", "lm_head"),
        (rf"^model\.{_LAYERS}", "model.language_model."),
        (
            r"^(?=(visual|vision_tower|vision_model|multi_modal_projector|connector)\b)",
            "model.",
        ),
    ),
    "the names inside a vision-language model": _renaming((r"^model\.language_model\.", "model.")),
    "the names of a model without its output layer": _renaming((r"^", "model.")),
}
"""Renamings of modules' paths, most likely first."""


@dataclass(frozen=True, kw_only=True)
class StoredName:
    """The name of a stored tensor, without decorations."""

    module: str
    """For a tensor that is not LoRA's, the name of the parameter."""
    part: Part | None
    """None for a weight of the model itself."""


def parse(name: str) -> StoredName | None:
    """The parts of a tensor's name; None for a kind of adapter that is not supported."""
    plain = _DECORATION.sub("", name)
    while plain.startswith(PREFIX):
        plain = plain.removeprefix(PREFIX)
    if match := _LORA.fullmatch(plain):
        part: Part = match["part"]  # type: ignore[assignment]
        return StoredName(module=match["module"], part=part)
    if _OTHER_LORA.search(plain):
        return None
    return StoredName(module=_SAVED.sub("", plain).replace(BASE_LAYER, ""), part=None)


def renaming(
    stored: Collection[StoredName], modules: Collection[str], parameters: Collection[str]
) -> tuple[str, Callable[[str], str]] | None:
    """The first renaming under which the model has every module and parameter, with its name.

    None if there is none.
    """
    for name, pairs in RENAMINGS.items():
        rename = function(pairs)
        if not missing(stored, rename, modules, parameters):
            return name, rename
    return None


def missing(
    stored: Iterable[StoredName],
    rename: Callable[[str], str],
    modules: Collection[str],
    parameters: Collection[str],
) -> list[str]:
    """The renamed modules and parameters that the model does not have."""
    renamed = [(rename(each.module.replace(BASE_LAYER, "")), each.part) for each in stored]
    return sorted(
        {name for name, part in renamed if name not in (parameters if part is None else modules)}
    )


def function(pairs: Renaming) -> Callable[[str], str]:
    """The renaming of a path."""

    def rename(path: str) -> str:
        for pattern, replacement in pairs:
            path = pattern.sub(replacement, path)
        return path

    return rename

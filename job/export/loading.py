"""The commands that load an export, as its model card shows them."""

import json
import shlex
from dataclasses import dataclass
from typing import Literal

from job.families.base import Family, Layout
from job.families.lora.patterns import max_rank
from job.spec.types import JobSpec

BASE_PLACEHOLDER = "BASE"
"""Stands for the folder of a base that is not on the hub."""


@dataclass(frozen=True, kw_only=True)
class Commands:
    """How to load a part of an export, or why something cannot load it."""

    python: str | None
    """With PEFT or Transformers."""
    python_note: str | None
    vllm: str | None
    vllm_note: str | None


def commands(
    spec: JobSpec,
    family: type[Family],
    *,
    part: Literal["adapter", "merged"],
    base: str | None,
    revision: str | None,
    base_layout: Layout | None,
    repository: str | None,
) -> Commands:
    """The commands for `part`.

    `base` is a repository on the hub, `base_layout` its layout if those of the family differ, and
    `repository` where the export is pushed to.
    """
    if part == "adapter":
        return _adapter(spec, family, base, revision, base_layout, repository)
    return _merged(spec, family, base_layout is not None, repository)


def _adapter(
    spec: JobSpec,
    family: type[Family],
    base: str | None,
    revision: str | None,
    base_layout: Layout | None,
    repository: str | None,
) -> Commands:
    model, processor = _classes(family)
    at = f", revision={json.dumps(revision)}" if base and revision else ""
    below = ', subfolder="adapter"' if repository and spec.export.hub_content == "all" else ""
    lines = [
        "from peft import PeftModel",
        f"from transformers import {model}, {processor}",
        "",
        f"base = {json.dumps(base or BASE_PLACEHOLDER)}",
        f'model = {model}.from_pretrained(base{at}, dtype="auto")',
        f"model = PeftModel.from_pretrained(model, {json.dumps(repository or 'adapter')}{below})",
        f"processor = {processor}.from_pretrained({json.dumps(repository or 'adapter')}{below})",
    ]
    notes = [] if base else [f"{BASE_PLACEHOLDER} is the folder of the base model."]
    if base_layout == "vllm":
        notes.append(
            "The base must be in the layout of Transformers; in its published layout, which this "
            "run read, the classes above cannot load it."
        )
    serving = family.adapter_serving(spec.lora)
    if serving.merged_only:
        vllm, vllm_note = None, (
            f"vLLM cannot serve this adapter ({', '.join(serving.merged_only)}): serve the merged "
            "weights."
        )  # fmt: skip
    else:
        name = base or BASE_PLACEHOLDER
        command = ["vllm", "serve", name, *(["--revision", revision] if base and revision else [])]
        command += [*family.vllm_arguments, "--enable-lora", "--max-lora-rank", str(_rank(spec))]
        command += ["--lora-modules", f"{spec.name}=adapter-vllm", *family.vllm_adapter_arguments]
        vllm = shlex.join(command)
        vllm_note = (
            "It reads the folder adapter-vllm, the same adapter under the names that it uses; with "
            "the names of this folder it can ignore weights without an error."
        )
    return Commands(
        python="\n".join(lines),
        python_note=" ".join(notes) or None,
        vllm=vllm,
        vllm_note=vllm_note,
    )


def _merged(
    spec: JobSpec, family: type[Family], layouts_differ: bool, repository: str | None
) -> Commands:
    model, processor = _classes(family)
    folder, layout = repository or "merged", spec.export.merged.layout
    python = python_note = vllm = vllm_note = None
    if layouts_differ and layout == "vllm":
        python_note = (
            "The files are in the published layout, which the classes of Transformers do not "
            "read; export.merged.layout: transformers exports the other one."
        )
    else:
        python = "\n".join(
            [
                f"from transformers import {model}, {processor}",
                "",
                f'model = {model}.from_pretrained({json.dumps(folder)}, dtype="auto")',
                f"processor = {processor}.from_pretrained({json.dumps(folder)})",
            ]
        )
    if layouts_differ and layout == "transformers":
        vllm_note = (
            "The files are in the layout of Transformers, which vLLM does not read; "
            "export.merged.layout: vllm exports the other one."
        )
    else:
        command = ["vllm", "serve", folder, "--dtype", spec.export.merged.dtype]
        vllm = shlex.join([*command, *family.vllm_arguments])
    return Commands(python=python, python_note=python_note, vllm=vllm, vllm_note=vllm_note)


def _classes(family: type[Family]) -> tuple[str, str]:
    """The classes of Transformers that load the model, and its processor or tokenizer."""
    if family.reads_images:
        return "AutoModelForImageTextToText", "AutoProcessor"
    return "AutoModelForCausalLM", "AutoTokenizer"


def _rank(spec: JobSpec) -> int:
    """The adapter's largest rank, rounded up to one that vLLM supports: 8, 16, 32 and so on."""
    return max(8, 1 << (max_rank(spec.lora) - 1).bit_length())

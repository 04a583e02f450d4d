"""Validates a spec and reports every problem at once.

The JSON Schema checks each key by itself; `rules` checks values against each other.
"""

import math
import re
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from job.errors import Problem
from job.spec import keys, rules
from job.spec.core_yaml import plain
from job.spec.foreign_names import fix_for_unknown_key, quoted, typo
from job.spec.keys import Json, Path, Schema
from job.spec.parse import Document
from job.spec.problems import Finding, locate, location_of
from job.spec.resolve import fill

# Other tools' names for values: by key, or under "" for every key that has such a value.
_VALUES: dict[str, dict[str, str]] = {
    "": {
        "bf16": "bfloat16",
        "fp16": "float16",
        "fp32": "float32",
        "half": "float16",
        "hf": "transformers",
        "huggingface": "transformers",
        "folder": "imagefolder",
        "wds": "webdataset",
    },
    "lora.method": {"qlora": "lora: quantized training is not supported in this version"},
    # float16 is a valid value, but refused for training.
    "model.dtype": dict.fromkeys(("fp16", "half"), "bfloat16"),
    "model.attn_implementation": dict.fromkeys(
        ("flash_attn", "flash_attention", "flash_attention_3", "fa2", "fa3", "xformers", "flex"),
        "auto, which uses the fastest attention that the machine supports",
    ),
    "runtime.accelerator": {"gpu": "auto, which uses a GPU if there is one", "nvidia": "cuda"}
    | dict.fromkeys(("amd", "hip"), "rocm"),
    "runtime.distributed": dict.fromkeys(("fsdp", "deepspeed", "zero3"), "fsdp2"),
    "train.optim": {
        "adamw": "adamw_torch",
        "adam": "adamw_torch",
        "adamw_hf": "adamw_torch",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "adamw_torch",
        "paged_adamw_32bit": "adamw_torch",
    },
    "train.report_to": {"none": "[]"},
}
# The key that a scalar most likely belongs to if it is written in place of a section.
_MAIN_KEYS = {
    "model": "model_name_or_path",
    "data": "train.uri",
    "data.train": "uri",
    "data.eval": "uri",
    "data.validation": "uri",
    "output": "uri",
}
# An item of a list that is mappings of keys.
_ITEMS = {"data.train": "- {uri: data/train.jsonl}", "reinforce.rewards": "- {name: exact_match}"}
_TEXTS: tuple[Path, ...] = (("data", "instruction"), ("data", "system"))
"""Values that may have several lines."""
_UNTIDY = re.compile(r"^\s|\s$|[\x00-\x1f\x7f\x85\u2028\u2029]")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+(?!\d|,)")
_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")


def problems(
    document: Document, *, shown: Json = None, known: Collection[Finding] = ()
) -> list[Problem]:
    """All problems of a spec, including the `known` findings, in line order.

    Values are quoted from `shown`, the document's values without secrets. Values with a `known`
    finding are not checked again.
    """
    values = document.values
    paths = {finding.path for finding in known}
    findings = list(known)
    for finding in (*_schema_findings(values), *_scalar_findings(values, ())):
        if not any(finding.path[: len(path)] == path for path in paths):
            paths.add(finding.path)
            findings.append(finding)
    options = {path for path, at in document.locations.items() if at.line is None}
    findings += rules.check(fill(values), paths, options)
    findings.sort(key=lambda finding: _line(document, finding.path))
    return [_problem(each, document, values if shown is None else shown) for each in findings]


def _line(document: Document, path: Path) -> float:
    location = location_of(document, path)
    if location is None:
        return 0
    return math.inf if location.line is None else location.line


def _problem(finding: Finding, document: Document, shown: Json) -> Problem:
    value = finding.value if finding.value is not None else _quote_at(shown, finding.path)
    # A fix may spell the value differently, and redaction would miss a secret in it.
    secret = _quote_at(shown, finding.path) != _quote_at(document.values, finding.path)
    return Problem(
        field=locate(document, finding.path),
        message=finding.message,
        value=value,
        fix=None if secret else finding.fix,
        key=keys.nearest_known(finding.path),
    )


def _quote_at(values: Json, path: Path) -> str | None:
    value: Any = values
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    if isinstance(value, str) and not isinstance(plain(value), str):
        return f'"{value}"'  # text that would be a number, boolean or null without quotes
    return quoted(value)


def schema_text() -> str:
    """The JSON Schema file."""
    return keys.SCHEMA_FILE.read_text(encoding="utf-8")


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(keys.schema())


def _schema_findings(values: Json) -> Iterator[Finding]:
    for error in _validator().iter_errors(values):
        path: Path = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            for name in error.instance:
                if name not in error.schema["properties"]:
                    unknown = (*path, name)
                    fix = fix_for_unknown_key(unknown, error.instance[name])
                    yield Finding(unknown, "is not a known key", fix)
        elif error.validator == "required":
            for name in error.validator_value:
                if name not in error.instance:
                    yield _missing((*path, name))
        else:
            node = keys.at(path)
            assert node is not None, "the schema has a key for every value that it refuses"
            yield Finding(path, _message(error, node), _fix(error, node))


def _missing(path: Path) -> Finding:
    node = keys.at(path)
    assert node is not None, "the schema has every key that it requires"
    if "examples" in node:
        return Finding(path, "is missing", f"add `{path[-1]}: {node['examples'][0]}`, or the like")
    inner = ", ".join(node.get("required", ()))
    return Finding(path, "is missing", f"add `{path[-1]}:` with at least {inner} in it")


def _message(error: ValidationError, node: Schema) -> str:
    if "errorMessage" in node:
        return str(node["errorMessage"])
    if error.validator == "pattern":
        return str(node["patternErrorMessage"])
    if error.validator in ("minLength", "minItems"):
        return "must not be empty"
    if error.validator == "uniqueItems":
        return "must not contain an item twice"
    return f"must be {keys.describe(node)}"


def _fix(error: ValidationError, node: Schema) -> str | None:
    value, kinds = error.instance, keys.types(node)
    dotted = ".".join(part for part in error.absolute_path if isinstance(part, str))
    if error.validator == "uniqueItems":
        return "remove the second"
    if "const" in node:
        return f"write {quoted(node['const'])}"
    if value is None and "default" in node:
        return f"remove the line to use the default, {quoted(node['default'])}"
    if "object" in kinds:
        if dotted in _MAIN_KEYS and isinstance(value, str) and value:
            return f"write it as {dotted}.{_MAIN_KEYS[dotted]}"
        if dotted in _ITEMS:
            return f"list its items under it, for example {_ITEMS[dotted]}"
        if keys.values_of(node) is not None:
            return f"for example {quoted(node['examples'][0])}"
        return "indent its keys under it"
    if isinstance(value, str) and (fix := _fix_text(value, node, kinds, dotted)):
        return fix
    wants_text = error.validator == "type" and "string" in kinds and "enum" not in node
    if wants_text and isinstance(value, int | float) and not {"integer", "boolean"} & {*kinds}:
        return "put it in quotes"
    if "boolean" in kinds and value in (0, 1):
        return f"write {quoted(bool(value))}"
    if node.get("default") is not None:
        return f"the default is {quoted(node['default'])}"
    return f"for example {quoted(node['examples'][0])}" if "examples" in node else None


def _fix_text(value: str, node: Schema, kinds: tuple[str, ...], dotted: str) -> str | None:
    if meant := _meant(value, node, dotted):
        return f"write {meant}"
    if "integer" in kinds or "number" in kinds:
        bare = _as_number(value)
        if isinstance(plain(bare), int if kinds == ("integer",) else int | float):
            return f"write {bare} without quotes" if bare == value else f"write {bare}"
    if "boolean" in kinds and value.lower() in (*_TRUE, *_FALSE):
        return f"write {quoted(value.lower() in _TRUE)}"
    if "array" in kinds and value:
        inner = keys.follow(node["items"])
        parts = [part.strip() for part in value.split(",")]
        if "enum" in inner:
            items = [_meant(part, inner, dotted) or part for part in parts]
            return f"write [{', '.join(items)}]" if set(items) <= {*inner["enum"]} else None
        return f"write [{', '.join(parts)}]"
    if "maxLength" in node and (name := _as_name(value, node["maxLength"])):
        return f"write {name}"
    return None


def _meant(value: str, node: Schema, dotted: str) -> str | None:
    """The choice that another tool's name, or a typo, stands for."""
    choices = [str(choice) for choice in node.get("enum", ())]
    name = value.lower()
    if known := _VALUES.get(dotted, {}).get(name):
        return known
    meant = _VALUES[""].get(name, name)
    return meant if meant in choices else typo(value, choices)


def _as_number(value: str) -> str:
    """Normalizes a number: removes thousands separators, or turns a decimal comma into a point."""
    bare = value.strip().replace("_", "")
    return bare.replace(",", "") if _THOUSANDS.match(bare) else bare.replace(",", ".")


def _as_name(value: str, longest: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", value.lower())[:longest].strip("-")


def _may_have_lines(path: Path, value: str) -> bool:
    """Whether the value is a text for the model, or a template instead of the location of one."""
    return path in _TEXTS or (path == ("model", "chat_template") and "{" in value)


def _scalar_findings(value: Json, path: Path) -> Iterator[Finding]:
    """Checks scalars for what JSON Schema cannot express."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _scalar_findings(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _scalar_findings(inner, (*path, index))
    elif isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            yield Finding(path, "must be Unicode text", "save it as UTF-8")
        elif not _may_have_lines(path, value) and _UNTIDY.search(value):
            message = "must not start or end with a space or contain a line break"
            yield Finding(path, message, "remove the spaces and line breaks")
    elif isinstance(value, float) and not math.isfinite(value):
        yield Finding(path, "must be a finite number")
    elif isinstance(value, int | float) and abs(value) >= 2**63:
        yield Finding(path, "must fit into 64 bits")

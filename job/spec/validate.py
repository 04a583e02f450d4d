"""Everything that is wrong with a spec, at once, in words for people.

The JSON Schema says what each key may hold; `rules` says what makes no sense together.
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
from job.spec.foreign_names import instead_of, quoted, typo
from job.spec.keys import Path, Schema
from job.spec.parse import Document
from job.spec.problems import Finding, locate, place_of
from job.spec.resolve import fill

# Values by the names that other tools give them: of one key, or of every key that takes them.
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
    "lora.method": {"qlora": "lora: quantized training is not offered by this version"},
    # float16 is a value of it, which is refused: it does not train.
    "model.dtype": dict.fromkeys(("fp16", "half"), "bfloat16"),
    "model.attn_implementation": dict.fromkeys(
        ("flash_attn", "flash_attention", "flash_attention_3", "fa2", "fa3", "xformers", "flex"),
        "auto, which takes the fastest attention that the machine runs",
    ),
    "runtime.accelerator": {"gpu": "auto, which takes a GPU where there is one", "nvidia": "cuda"}
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
# Where a value stands in place of the section that it belongs to.
_HEARTS = {
    "model": "model_name_or_path",
    "data": "train.uri",
    "data.train": "uri",
    "data.eval": "uri",
    "output": "uri",
}
_UNTIDY = re.compile(r"^\s|\s$|[\x00-\x1f\x7f\x85\u2028\u2029]")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+(?!\d|,)")
_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")


def problems(
    document: Document, *, shown: Any = None, known: Collection[Finding] = ()
) -> list[Problem]:
    """Every problem of a spec, those of `known` included, in the order of its lines.

    `shown` is the document's values without secrets, to quote from. What `known` has a finding
    for is not looked at again.
    """
    values = document.values
    paths = {finding.path for finding in known}
    found = list(known)
    for finding in (*_schema_findings(values), *_scalar_findings(values, ())):
        if not any(finding.path[: len(path)] == path for path in paths):
            paths.add(finding.path)
            found.append(finding)
    options = {path for path, place in document.places.items() if place.line is None}
    found += rules.broken(fill(values), paths, options)
    found.sort(key=lambda finding: _line(document, finding.path))
    return [_problem(finding, document, values if shown is None else shown) for finding in found]


def _line(document: Document, path: Path) -> float:
    place = place_of(document, path)
    if place is None:
        return 0
    return math.inf if place.line is None else place.line


def _problem(finding: Finding, document: Document, shown: Any) -> Problem:
    found = finding.value if finding.value is not None else _quote_at(shown, finding.path)
    # A fix may spell the value in another way, under which no one would know a secret again.
    secret = _quote_at(shown, finding.path) != _quote_at(document.values, finding.path)
    return Problem(
        field=locate(document, finding.path),
        message=finding.message,
        value=found,
        fix=None if secret else finding.fix,
        key=keys.nearest_known(finding.path),
    )


def _quote_at(values: Any, path: Path) -> str | None:
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    if isinstance(values, str) and not isinstance(plain(values), str):
        return f'"{values}"'  # text where a number or the like would be read without quotes
    return quoted(values)


def schema_text() -> str:
    """The JSON Schema as it is shipped."""
    return keys.SCHEMA_FILE.read_text(encoding="utf-8")


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(keys.schema())


def _schema_findings(values: Any) -> Iterator[Finding]:
    for error in _validator().iter_errors(values):
        path: Path = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            for name in error.instance:
                if name not in error.schema["properties"]:
                    unknown = (*path, name)
                    told = instead_of(unknown, error.instance[name])
                    yield Finding(unknown, "is not a known key", told)
        elif error.validator == "required":
            for name in error.validator_value:
                if name not in error.instance:
                    yield _missing((*path, name))
        else:
            node = keys.at(path)
            assert node is not None, "the schema describes every value that it refuses"
            yield Finding(path, _message(error, node), _fix(error, node))


def _missing(path: Path) -> Finding:
    node = keys.at(path)
    assert node is not None, "the schema describes every key that it requires"
    if "examples" in node:
        return Finding(path, "is missing", f"add `{path[-1]}: {node['examples'][0]}`, or the like")
    inner = ", ".join(node.get("required", ()))
    return Finding(path, "is missing", f"add `{path[-1]}:` with at least {inner} below it")


def _message(error: ValidationError, node: Schema) -> str:
    if "errorMessage" in node:
        return str(node["errorMessage"])
    if error.validator == "pattern":
        return str(node["patternErrorMessage"])
    if error.validator in ("minLength", "minItems"):
        return "must not be empty"
    if error.validator == "uniqueItems":
        return "must not hold the same item twice"
    return f"must be {keys.describe(node)}"


def _fix(error: ValidationError, node: Schema) -> str | None:
    value, kinds = error.instance, keys.types(node)
    dotted = ".".join(part for part in error.absolute_path if isinstance(part, str))
    if error.validator == "uniqueItems":
        return "remove the second"
    if "const" in node:
        return f"write {quoted(node['const'])}"
    if value is None and "default" in node:
        return f"remove the line to take the default, {quoted(node['default'])}"
    if "object" in kinds:
        if dotted in _HEARTS and isinstance(value, str) and value:
            return f"write it as {dotted}.{_HEARTS[dotted]}"
        return "indent its keys below it"
    if isinstance(value, str) and (fix := _fix_text(value, node, kinds, dotted)):
        return fix
    wants_text = error.validator == "type" and "string" in kinds and "enum" not in node
    if wants_text and isinstance(value, int | float) and "integer" not in kinds:
        return "put it in quotes"
    if kinds == ("boolean",) and value in (0, 1):
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
    if kinds == ("boolean",) and value.lower() in (*_TRUE, *_FALSE):
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
    """The one value of a choice that is meant, as other tools call it or mistyped."""
    choices = [str(choice) for choice in node.get("enum", ())]
    name = value.lower()
    if known := _VALUES.get(dotted, {}).get(name):
        return known
    meant = _VALUES[""].get(name, name)
    return meant if meant in choices else typo(value, choices)


def _as_number(value: str) -> str:
    """The number that is meant: a comma parts thousands, or else stands for the dot."""
    bare = value.strip().replace("_", "")
    return bare.replace(",", "") if _THOUSANDS.match(bare) else bare.replace(",", ".")


def _as_name(value: str, longest: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", value.lower())[:longest].strip("-")


def _scalar_findings(value: Any, path: Path) -> Iterator[Finding]:
    """What JSON has no word for and a schema so cannot refuse."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _scalar_findings(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _scalar_findings(inner, (*path, index))
    elif isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            yield Finding(path, "must be Unicode text", "save it as UTF-8")
        elif path != ("data", "instruction") and _UNTIDY.search(value):
            message = "must not start or end with a space, nor hold a line break"
            yield Finding(path, message, "remove the spaces and line breaks")
    elif isinstance(value, float) and not math.isfinite(value):
        yield Finding(path, "must be a finite number")
    elif isinstance(value, int | float) and abs(value) >= 2**63:
        yield Finding(path, "must be a number that fits into 64 bits")

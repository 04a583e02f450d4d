"""Drafts a spec: finds the files, maps the columns, reads a sample and measures it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from job import storage
from job.drafting import answers, lengths, shares
from job.drafting.mapping import (
    Choose,
    RowMapping,
    as_options,
    map_columns,
    named_columns,
    refuse_unlabeled_images,
)
from job.errors import DataError, InputError, SpecError, UsageError
from job.families import model_source
from job.prep import sources
from job.prep.convert import to_results
from job.prep.discovery import find_source, splits_in
from job.prep.readers import Record
from job.prep.rows import Reject, Row
from job.prep.source_files import DataSource
from job.spec.answer_kinds import Answer
from job.spec.load import load_spec
from job.spec.types import DataSpec, JobSpec

SAMPLE_ROWS = 200
"""Rows that are read to guess from."""
_ROLES = {"eval": ("test",), "validation": ("validation", "val", "dev", "eval")}
"""The names of splits by the key of `data` that takes them."""
_FIELD = "$.data.train"


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """What the user says of the spec to draft."""

    uri: str
    """Of the rows: a file, a folder or a glob."""
    name: str
    model: str
    output_uri: str
    instruction: str | None
    answer: Answer | None
    """None guesses it."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """By key of `columns`; others are found."""
    choose: Choose | None = None
    """Asks the user for a column; None if there is nobody to ask."""
    ask: Callable[[str, str], str] | None = None
    """Asks the user a question, with a proposed answer; None if there is nobody to ask."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What was found out about the rows, and decided for the spec."""

    options: DraftOptions
    splits: Mapping[str, str]
    """The split of each source, by key of `data`; empty if the rows are not in splits."""
    columns: Mapping[str, str]
    """To name in the spec, by key of `columns`."""
    instruction: str | None
    text_only: bool
    answer: answers.AnswerKind
    lengths: lengths.Lengths
    shares: shares.Shares
    rows: int
    exact: bool
    """Whether all rows were counted."""
    sampled: int
    rejects: tuple[Reject, ...]
    """Of the sampled rows."""
    without_image: int
    """Sampled rows, if others have images."""


def make_draft(options: DraftOptions) -> Draft:
    """Drafts the spec; reads the first rows only.

    Raises InputError if data or model are missing, DataError if the data cannot become rows, and
    UsageError if something is missing on the command line and there is nobody to ask.
    """
    if options.uri.startswith("builtin://"):
        raise UsageError(
            "DATA", "must be rows of your own", value=options.uri,
            fix="copy specs/latex.yaml, which uses it",
        )  # fmt: skip
    try:
        _spec(options, {})
        _require_files(options.uri)
        splits = _splits(options.uri)
        data = _spec(options, splits).data
        source = find_source(data.train[0], _FIELD)
        mapping = _map(options, source, data)
        records = list(islice(sources.read(source, data.train[0]), SAMPLE_ROWS))
        rows, rejects = _rows(records, mapping, options.uri)
        _check_model(options, splits)
        total, exact = sources.estimate_count(source, data.train[0])
    except (DataError, InputError) as error:
        raise as_options(error) from error
    if total < 2:
        raise DataError("DATA", "has a single row: none would be left to evaluate on",
                        value=options.uri, fix="name more rows")  # fmt: skip
    kind = answers.guess(rows)
    if options.answer is not None:
        kind = answers.AnswerKind(kind=options.answer, reason="as --answer says")
    instruction = _instruction(options, mapping, kind, rows[0])
    without_image = sum(not row.images for row in rows)
    text_only = without_image == len(rows)
    return Draft(
        options=options,
        splits=splits,
        columns=_columns(source, records, mapping),
        instruction=instruction,
        text_only=text_only,
        answer=kind,
        lengths=lengths.measure(
            rows, options.model, (instruction or "") if mapping.needs_instruction else ""
        ),
        shares=shares.propose(
            total,
            rows,
            mapping.data,
            kind.kind,
            whole=exact and len(records) >= total,
            toy=options.model.startswith(model_source.BUILTIN),
        ),
        rows=total,
        exact=exact,
        sampled=len(records),
        rejects=rejects,
        without_image=0 if text_only else without_image,
    )


def _require_files(uri: str) -> None:
    if not storage.has_glob(uri) and "{" not in uri and not storage.exists(uri):
        raise InputError(
            "DATA", "is no file, nor a folder with files", value=uri, fix="check the path"
        )


def _splits(uri: str) -> dict[str, str]:
    """The split for each key of `data`, if the folder has several."""
    found = splits_in(uri)
    if len(found) < 2:
        return {}
    if "train" not in found:
        raise InputError(
            "DATA",
            f"has the splits {', '.join(found)}, but none to train on",
            value=uri,
            fix="name the files to train on",
        )
    roles = {"train": "train"}
    for key, names in _ROLES.items():
        if (name := next((name for name in names if name in found), None)) is not None:
            roles[key] = name
    return roles


_OPTIONS = {
    "model.model_name_or_path": "--model",
    "output.uri": "--output-uri",
    "data.instruction": "--instruction",
}
"""The options that values of the spec come from; others come from `DATA`."""


def _spec(options: DraftOptions, splits: Mapping[str, str]) -> JobSpec:
    """A spec that names the rows and nothing else."""
    uri = _literal(options.uri)
    train = {"uri": uri, **({"split": splits["train"]} if splits else {})}
    others = {key: {"uri": uri, "split": splits[key]} for key in _ROLES if key in splits}
    asked = {} if options.instruction is None else {"instruction": _literal(options.instruction)}
    spec = {
        "version": 1,
        "name": options.name,
        "model": {"model_name_or_path": _literal(options.model)},
        "data": {"train": train, **others, **asked},
        "train": {"eval_strategy": "epoch"} if "validation" in others else {},
        "output": {"uri": _literal(options.output_uri)},
    }
    try:
        return load_spec(json.dumps(spec, ensure_ascii=False), "the draft", environ={}).spec
    except SpecError as error:
        fields = {_OPTIONS.get(problem.key or "", "DATA"): problem for problem in error.problems}
        problems = [replace(each, field=field, key=None) for field, each in fields.items()]
        raise UsageError.from_problems(problems) from error


def _literal(text: str) -> str:
    return text.replace("${", "$${")


def _map(options: DraftOptions, source: DataSource, data: DataSpec) -> RowMapping:
    try:
        return map_columns(source, data, options.columns, options.choose)
    except DataError as error:
        refuse_unlabeled_images(source, error)
        raise


def _rows(
    records: Sequence[Record], mapping: RowMapping, uri: str
) -> tuple[list[Row], tuple[Reject, ...]]:
    """Raises DataError if none of the records makes a row."""
    results = list(to_results(records, mapping.options))
    rows = [result for result in results if isinstance(result, Row)]
    rejects = tuple(result for result in results if isinstance(result, Reject))
    if not rows:
        raise DataError(
            rejects[0].id if rejects else "DATA",
            f"{rejects[0].reason}; no other of the first {len(records)} rows can be used either"
            if rejects
            else "has no rows",
            value=uri,
            fix="correct the rows; `job prep` lists the reason of each",
        )
    return rows, rejects


def _check_model(options: DraftOptions, splits: Mapping[str, str]) -> None:
    """Raises InputError if the model is a local folder without a model."""
    if storage.is_local(model_source.location(options.model)):
        try:
            model_source.find_model(_spec(options, splits).model)
        except InputError as error:
            problems = [replace(each, field="--model", key=None) for each in error.problems]
            raise InputError.from_problems(problems) from error


def _columns(source: DataSource, records: Sequence[Record], mapping: RowMapping) -> dict[str, str]:
    """Folders and archives of images with their texts have no columns of their own."""
    if any(file.format in ("imagefolder", "webdataset") for file in source.files):
        return {}
    readable = [record for record in (each.parsed() for each in records) if record.values]
    return named_columns(readable, mapping.options)


_PROPOSALS: Mapping[Answer, str] = {
    "json": "Read it as JSON.",
    "latex": "Write the LaTeX representation for this image.",
    "text": "What does the image say?",
    "label": "What is it?",
}
_MOST_CHOICES = 10


def _instruction(
    options: DraftOptions, mapping: RowMapping, kind: answers.AnswerKind, row: Row
) -> str | None:
    if options.instruction is not None or not mapping.needs_instruction:
        return options.instruction
    proposal = _PROPOSALS[kind.kind]
    if 1 < len(kind.labels) <= _MOST_CHOICES:
        proposal = f"Which of these is it: {', '.join(sorted(kind.labels))}?"
    example = " ".join(row.answer.split())
    example = f"{example[:60]}…" if len(example) > 60 else example
    if options.ask is None:
        raise UsageError(
            "--instruction",
            "is required: rows are an image and its text, without a question "
            f"({row.id} answers “{example}”)",
            fix=f'say what is asked about each image, for example --instruction "{proposal}"',
        )
    return options.ask(
        f"Rows are an image and its text, for example {row.id}: {example}\n"
        "What is asked about each image?",
        proposal,
    )

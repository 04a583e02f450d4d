"""Finds out what makes a row of a source: its columns, and whether they need an instruction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from job import storage
from job.errors import DataError, InputError, UsageError
from job.prep import sources
from job.prep.columns import MESSAGES, Columns, ReadOptions
from job.prep.discovery import NO_FILES
from job.prep.readers import Record
from job.prep.source_check import ANSWER_NAMES, ColumnsError, check_source
from job.prep.source_files import DataSource
from job.spec.types import ColumnsSpec, DataSpec

Choose = Callable[[str, Sequence[str]], str]
"""Asks the user a question; returns one of the choices."""
OPTIONS = {
    key: f"--{key}-column" for key in ("image", "text", "question", "messages", "system", "id")
}
"""The command's options by key of `columns`; those of the last three do not exist."""
GIVEN_COLUMNS = ("image", "text", "question")
_ROLES = {"image": "the image", "text": "the answer", "question": "the question"}
_FIELD = "$.data.train"


@dataclass(frozen=True, kw_only=True)
class RowMapping:
    """How the records of a source become rows."""

    data: DataSpec
    options: ReadOptions
    needs_instruction: bool
    """Whether rows without an instruction would be refused; `data` has one then."""


def map_columns(
    source: DataSource, data: DataSpec, given: Mapping[str, str], choose: Choose | None
) -> RowMapping:
    """Maps the columns of the first training source; `given` has those that the user named.

    `data.instruction` may be None. Raises DataError if the records cannot become rows, and
    UsageError if several columns could have a role and there is nobody to ask.
    """
    spec = replace(data.train[0], columns=replace(data.train[0].columns, **given))
    records = sources.head(source)
    if (conversations := _conversations(records)) and not given:
        spec = replace(spec, columns=replace(spec.columns, messages=conversations))
    needs_instruction = False
    for _ in range(2 * len(OPTIONS)):
        data = replace(data, train=(spec, *data.train[1:]))
        try:
            options = check_source(source, spec, data, _FIELD)
            return RowMapping(data=data, options=options, needs_instruction=needs_instruction)
        except ColumnsError as error:
            column = _column(error, spec.columns, given, choose)
            spec = replace(spec, columns=replace(spec.columns, **{error.key: column}))
        except DataError as error:
            if error.problems[0].field != "$.data.instruction":
                raise
            needs_instruction, data = True, replace(data, instruction="?")
    raise AssertionError("each round names another column")


def _conversations(records: Sequence[Record]) -> str | None:
    """An unusually named column of conversations, if there is one."""
    names = dict.fromkeys(name for record in records for name in record.values or ())
    for name in names if not {*names} & {*MESSAGES} else ():
        values = [(record.values or {}).get(name) for record in records]
        if all(isinstance(v, list) and v and all(map(_is_turn, v)) for v in values):
            return name
    return None


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and (
        {"role", "content"} <= {*value} or {"from", "value"} <= {*value}
    )


def _column(
    error: ColumnsError,
    columns: ColumnsSpec,
    given: Mapping[str, str],
    choose: Choose | None,
) -> str:
    """The column that has the role of the error, as chosen by the user or by its name."""
    key, names = error.key, error.candidates
    [problem] = error.problems
    option = OPTIONS[key]
    if key == "image" and not names:
        raise DataError(
            "DATA",
            problem.message.replace("there is no column `image`", "rows have neither an image nor "
                                    "a question"),
            fix="name the column of the question: --question-column NAME",
        ) from error  # fmt: skip
    if key in given or not names or asdict(columns)[key] is not None:
        fix = problem.fix
        if names and key in GIVEN_COLUMNS:
            fix = f"write {option} {names[0]}"
        where = option if key in given else "DATA"
        raise DataError(where, problem.message, value=given.get(key), fix=fix) from error
    if len(names) == 1 or (key == "text" and names[0].lower() in ANSWER_NAMES):
        return names[0]
    if choose is not None:
        return choose(f"{problem.message}\nWhich column is {_ROLES[key]}?", names)
    more = "; several images of a row belong in one list" if key == "image" else ""
    raise UsageError(
        option, f"is required: {problem.message}", fix=f"name one of {', '.join(names)}{more}"
    ) from error


def named_columns(records: Sequence[Record], options: ReadOptions) -> dict[str, str]:
    """The columns to name in the spec: those that every record has, by key of `columns`."""
    found: dict[str, set[str | None]] = {}
    for record in records:
        values = record.values or {}
        columns = Columns.of(options.columns, values, text_only=options.text_only)
        for key in asdict(options.columns):
            found.setdefault(key, set()).add(getattr(columns, key))
    return {
        key: name
        for key, names in found.items()
        if len(names) == 1 and isinstance(name := next(iter(names)), str)
    }


def refuse_unlabeled_images(source: DataSource, error: DataError) -> None:
    """Raises DataError with a way out if the source is a folder of images without texts."""
    files = [file for file in source.files if file.problem is None]
    if not files or any(f.format != "imagefolder" or f.text_uri is not None for f in files):
        return
    folders = sorted({file.uri.rpartition("/")[0].rpartition("/")[2] for file in files})
    message = f"none of its {len(files)} images has a text file of the same name"
    fix = "write the answer of a.png into a.txt, or list the images with their answers in a CSV"
    if len(folders) > 1:
        shown = ", ".join(folders[:5])
        message += f"; its folders may be classes: {shown}"
        if storage.is_local(source.uri):
            fix = (
                "list them in the folder: (echo image,label; for f in */*; do echo "
                '"$f,${f%%/*}"; done) > labels.csv'
            )
    raise DataError("DATA", message, value=source.uri, fix=fix) from error


def as_options(error: DataError | InputError) -> DataError | InputError:
    """The error in terms of the command: `DATA` in place of keys of the spec."""
    problems = []
    for problem in error.problems:
        if problem.field.startswith(_FIELD):
            fix = problem.fix
            if problem.message == NO_FILES:
                fix = (
                    "name a folder of images with their texts, or a list: jsonl, json, csv, tsv "
                    "or parquet"
                )
            problem = replace(problem, field="DATA", fix=fix)
        fix = problem.fix and problem.fix.replace(" and `format`", "")  # init has no such option
        problems.append(replace(problem, fix=fix, key=None))
    return type(error).from_problems(problems)

"""The spec's own chat template, `model.chat_template`: reads it, and checks its syntax.

Imports no Transformers, which renders it, in Jinja's sandbox.
"""

import re
import traceback

from job import storage
from job.errors import InputError, SpecError
from job.spec.types import ModelSpec

FIELD = "$.model.chat_template"
FILE = "chat_template.jinja"
"""The file of a checkpoint, or beside an adapter, that holds the template."""
NEEDED = (
    "correct it: a template shows the text of every message and each image once, begins an answer "
    "where its generation prompt ends, and ends it with a control token"
)
MAX_BYTES = 2**20
_INLINE = re.compile(r"\{[{%]")
_GENERATION_MARK = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""Transformers' own tags, which plain Jinja does not know."""
_COMPILED = "<template>"
"""The file name of templates' code in tracebacks."""


def is_inline(template: str) -> bool:
    """Whether the value is a template itself, not the location of one."""
    return _INLINE.search(template) is not None


def text_of(model: ModelSpec) -> str | None:
    """The spec's template; None if the spec has none.

    Raises SpecError if it is too large, no UTF-8, or no Jinja template, with the line, and
    InputError if there is no such file.
    """
    value = model.chat_template
    if value is None:
        return None
    text = value if is_inline(value) else _read(value)
    if not is_inline(text):
        raise _refused(value, "holds no Jinja: a template that shows no message", "name a template")
    _require_jinja(value, text)
    return text


def require_local(model: ModelSpec) -> None:
    """Raises the errors of `text_of` if the template is in the spec or on this machine."""
    value = model.chat_template
    if value is not None and (is_inline(value) or storage.is_local(value)):
        text_of(model)


def line_of(error: BaseException) -> int | None:
    """The line of the template at which Jinja failed, if it says so."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == _COMPILED]
    return lines[-1] if lines else None


def at_line(error: BaseException) -> str:
    """The error's message, with the line of the template if it is known."""
    line = line_of(error)
    return str(error) if line is None else f"line {line}: {error}"


def _read(uri: str) -> str:
    try:
        if (size := storage.size(uri)) > MAX_BYTES:
            raise _refused(uri, f"has {size:,} bytes, more than {MAX_BYTES:,}", "name a template")
        return storage.read_bytes(uri).decode("utf-8-sig")
    except InputError as error:
        problem = error.problems[0]
        fix = "name a .jinja file, or write the template itself"
        raise InputError(FIELD, problem.message, value=uri, fix=fix) from error
    except UnicodeDecodeError as error:
        raise _refused(uri, f"is not UTF-8: {error.reason}", "save it as UTF-8") from error


def _require_jinja(value: str, text: str) -> None:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(_GENERATION_MARK.sub("", text))
    except TemplateSyntaxError as error:
        raise _refused(value, f"is no Jinja template: {at_line(error)}", "correct it") from error


def _refused(value: str, reason: str, fix: str) -> SpecError:
    shown = "(written in the spec)" if is_inline(value) else value
    return SpecError(FIELD, reason, value=shown, fix=fix)

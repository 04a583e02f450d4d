"""The Jinja environment of the job's pages."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from job import log, redaction
from job.evaluation.report.formatting import amount
from job.evaluation.report.generated_text import visible

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent


@functools.cache  # with the templates that it has compiled
def environment(*folders: Path, styles: tuple[Path, ...] = ()) -> "Environment":
    """Escapes HTML, redacts secrets and shows invisible characters.

    `folders` hold templates beside the report's own; `styles` are style sheets beside its own.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def safe(value: object) -> object:
        # Markup is a str subclass that only this package creates.
        return visible(redaction.redact(value)) if type(value) is str else value

    made = Environment(
        loader=FileSystemLoader([_HERE, *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sheets = (_HERE / "page.css", *styles)
    style = "".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    made.globals["style"] = Markup(style)  # noqa: S704
    made.filters |= {"size": log.size, "amount": amount}
    return made

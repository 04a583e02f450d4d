"""Imports Unsloth into this process.

Importing it patches torch, PEFT and Transformers, depending on environment variables, and misses
whatever was imported from Transformers before. So, if selected, it is imported first.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from job import log
from job.engines.choice import FIELD
from job.errors import SpecError

SETTINGS = {
    "UNSLOTH_DISABLE_STATISTICS": "1",  # would download a file from the hub, as telemetry
    "UNSLOTH_DISABLE_FAST_GENERATION": "1",  # answers must not depend on the engine
    "UNSLOTH_RETURN_LOGITS": "0",
    "UNSLOTH_ENABLE_FULL_FINETUNING": "0",
}


def import_unsloth(cache: Path, *, compiled: bool) -> None:
    """Imports Unsloth, which writes its rewritten modules below `cache`.

    `compiled` selects torch.compile for its rewritten forward passes. Raises SpecError if the
    import fails.
    """
    directory = cache / "unsloth" / ("compiled" if compiled else "as-written")
    directory.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        SETTINGS,
        UNSLOTH_COMPILE_LOCATION=str(directory.resolve()),
        UNSLOTH_COMPILE_DISABLE="0" if compiled else "1",
    )
    if "transformers" in sys.modules and "unsloth" not in sys.modules:
        log.warn("transformers was imported before unsloth; training may be slower")
    try:
        with quiet():
            import unsloth
    except Exception as error:  # an incompatible package raises anything
        raise SpecError(
            FIELD,
            f"cannot be imported: {type(error).__name__}: {error}",
            value="unsloth",
            fix='install the locked versions: make setup EXTRAS="gpu unsloth"',
        ) from error
    log.debug("unsloth", version=unsloth.__version__, rewritten_modules=directory)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Redirects Unsloth's output to the debug log, which `--verbose` shows."""
    handlers = list(logging.root.handlers)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.handlers[:] = handlers  # Unsloth adds one, for all warnings
        logging.getLogger("unsloth_zoo").setLevel(logging.ERROR)
        for line in filter(None, map(str.strip, output.getvalue().splitlines())):
            log.debug("unsloth", line=line)

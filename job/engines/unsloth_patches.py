"""Unsloth in this process.

It patches torch, PEFT and Transformers when it is imported, by what the environment says then, and
finds nothing of Transformers that was imported before it. So it comes first, once it is chosen.
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
    "UNSLOTH_DISABLE_STATISTICS": "1",  # it would fetch a file from the hub, for its maker to count
    "UNSLOTH_DISABLE_FAST_GENERATION": "1",  # answers are judged as every other engine writes them
    "UNSLOTH_RETURN_LOGITS": "0",
    "UNSLOTH_ENABLE_FULL_FINETUNING": "0",
}


def bring_in(cache: Path, *, compiled: bool) -> None:
    """Imports Unsloth; what it writes of rewritten modules goes below `cache`.

    `compiled` says whether its forward passes go through torch.compile; without they are rewritten
    all the same. Raises SpecError where it cannot be imported.
    """
    place = cache / "unsloth" / ("compiled" if compiled else "as-written")
    place.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        SETTINGS,
        UNSLOTH_COMPILE_LOCATION=str(place.resolve()),
        UNSLOTH_COMPILE_DISABLE="0" if compiled else "1",
    )
    if "transformers" in sys.modules and "unsloth" not in sys.modules:
        log.warn("transformers was imported before unsloth, which may train slower for it")
    try:
        with quiet():
            import unsloth
    except Exception as error:  # where a package does not fit, it raises whatever it meets
        raise SpecError(
            FIELD,
            f"cannot be imported: {type(error).__name__}: {error}",
            value="unsloth",
            fix='install what the lock names: make setup EXTRAS="gpu unsloth"',
        ) from error
    log.debug("unsloth", version=unsloth.__version__, rewritten_modules=place)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what Unsloth prints out of the job's own lines; `--verbose` shows it."""
    handlers = list(logging.root.handlers)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.handlers[:] = handlers  # it puts one there, for everybody's warnings
        logging.getLogger("unsloth_zoo").setLevel(logging.ERROR)
        for line in filter(None, map(str.strip, said.getvalue().splitlines())):
            log.debug("unsloth says", line=line)

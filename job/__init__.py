"""A batch job that fine-tunes vision-language models from a declarative YAML spec."""

import os
import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and not getattr(sys.flags, "safe_path", False):
    # `python -m job` searches the current folder first, where a `json.py` beside a spec would
    # shadow Python's own. If that folder is the job's own checkout, it is searched last instead.
    _first = sys.path.pop(0)
    _own = os.path.join(_first, "job")  # noqa: PTH118 - pathlib could be a file of that folder
    if os.path.realpath(_own) == os.path.realpath(__path__[0]):
        sys.path.append(_first)

"""A batch job that fine-tunes vision-language models from a declarative YAML spec."""

import os
import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and not getattr(sys.flags, "safe_path", False):
    # `python -m job` looks for modules in the current folder first: a `json.py` beside a spec would
    # take the place of Python's own. Only a checkout is found there itself, and comes last then.
    _first = sys.path.pop(0)
    _own = os.path.join(_first, "job")  # noqa: PTH118 - pathlib could be a file of that folder
    if os.path.realpath(_own) == os.path.realpath(__path__[0]):
        sys.path.append(_first)

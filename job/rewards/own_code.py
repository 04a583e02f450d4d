"""Rewards by a user's own function, named `module:function`.

The module is installed in the environment, or in a folder of `PYTHONPATH`. The working directory
is not searched unless `PYTHONPATH` names it, even if Python would search it: `finetune-job` starts
from anywhere, in a pod too. The function is called as TRL calls its own, with keywords:
`completions`, `prompts`, `references` and `rows`; with those that it names, or all if it takes
`**kwargs`.
"""

import hashlib
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from job.errors import InputError, SpecError
from job.rewards.reward import Reward, Scored

KEYWORDS = ("completions", "prompts", "references", "rows")

_PATH = "install it in the image, or add its folder to PYTHONPATH"


def load(name: str, field: str) -> Reward:
    """The reward of `module:function`; `field` names it in errors.

    Raises InputError if there is no such module, and SpecError if it cannot be imported, has no
    such function, or the function needs an argument that it would not get.
    """
    module_name, _, function_name = name.partition(":")
    module = _module(module_name, name, field)
    function = getattr(module, function_name, None)
    if not callable(function):
        found = sorted(
            each
            for each, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module_name
        )
        functions = f"; its functions are {', '.join(found)}" if found else ""
        if hasattr(module, function_name):
            kind = type(function).__name__
            raise SpecError(
                field,
                f"is not a function: {function_name} in the module {module_name} has the type "
                f"{kind}{functions}",
                value=name,
                fix="name one of its functions" if found else "name a function",
            )
        close = get_close_matches(function_name, found, 1)
        raise SpecError(
            field,
            f"has no function {function_name} in the module {module_name}{functions}",
            value=name,
            fix=f"write {module_name}:{close[0]}" if close else "define it there",
        )
    keywords = _keywords(function, name, field)

    def reward(answers: Sequence[Scored]) -> list[float]:
        arguments = {
            "completions": [each.answer for each in answers],
            "prompts": [each.prompt for each in answers],
            "references": [each.reference for each in answers],
            "rows": [each.row for each in answers],
        }
        try:
            values = function(**{keyword: arguments[keyword] for keyword in keywords})
            return _checked(values, len(answers), name, field)
        except SpecError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(error, "raised", name, field) from error

    return reward


def digest(name: str) -> str | None:
    """The SHA-256 of the file that defines `module:function`, in hexadecimal; None without one.

    A run whose function changed learns anew. Files that the module imports do not count.
    """
    found = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return hashlib.sha256(Path(found).read_bytes()).hexdigest() if found else None


def _module(module_name: str, name: str, field: str) -> ModuleType:
    try:
        with _without_working_directory():
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        unsearched = _in_working_directory(error.name)
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                field,
                f"imports {error.name}, which is not installed{unsearched}",
                value=name,
                fix=f"install {error.name} in the image, or add its folder to PYTHONPATH",
            ) from error
        raise InputError(
            field, f"no module {error.name} can be imported{unsearched}", value=name, fix=_PATH
        ) from error
    except (Exception, SystemExit) as error:  # whatever it does
        raise _failed(error, "cannot be imported:", name, field) from error


@contextmanager
def _without_working_directory() -> Iterator[None]:
    """Takes the working directory out of the search path unless `PYTHONPATH` names it.

    `python -m job` in its own checkout needs that folder for the processes that it starts, and a
    checkout that is installed for development is in the path of every process.
    """
    named = {
        os.path.realpath(each)
        for each in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if each
    }
    here = os.path.realpath(Path.cwd())
    before = sys.path[:]
    if here not in named:
        sys.path[:] = [each for each in before if os.path.realpath(each) != here]
    try:
        yield
    finally:
        added = [each for each in sys.path if each not in before]  # by the module itself
        sys.path[:] = [*added, *before]


def _in_working_directory(module_name: str | None) -> str:
    """Says where modules are looked for if the working directory has the one that was not found."""
    top = (module_name or "").partition(".")[0]
    here = Path.cwd()
    if not top or not ((here / f"{top}.py").is_file() or (here / top).is_dir()):
        return ""
    return (
        ": it is looked for among the installed packages and in the folders of PYTHONPATH, and not "
        "in the working directory, which has it"
    )


def _keywords(function: Callable[..., object], name: str, field: str) -> tuple[str, ...]:
    """The keywords to call the function with."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return KEYWORDS  # one that is written in C does not tell
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    own = {each.name for each in parameters}
    named = tuple(keyword for keyword in KEYWORDS if takes_all or keyword in own)
    needed = [
        each.name
        for each in parameters
        if each.default is each.empty
        and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        and (each.name not in named or each.kind is each.POSITIONAL_ONLY)
    ]
    if needed or not named:
        raise SpecError(
            field,
            f"needs the argument {needed[0]}, which rewards do not get"
            if needed
            else "takes no argument",
            value=name,
            fix=f"name its arguments by keyword, of {', '.join(KEYWORDS)}, or add **kwargs",
        )
    return named


def _checked(values: object, count: int, name: str, field: str) -> list[float]:
    """The values as numbers. Raises SpecError unless they are `count` numbers from 0 to 1."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | dict):
        raise SpecError(
            field,
            f"returned {type(values).__name__} instead of a list of numbers",
            value=name,
            fix="return one number from 0 to 1 for every completion",
        )
    given = list(values)
    if len(given) != count:
        raise SpecError(
            field,
            f"returned {len(given)} values for {count} completions",
            value=name,
            fix="return one number from 0 to 1 for every completion, in their order",
        )
    for number, value in enumerate(given):
        try:
            # Text is refused: TRL would not take it either, and a number in it is an oversight.
            given[number] = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            given[number] = math.nan
        if not 0 <= given[number] <= 1:  # NaN is not, either
            raise SpecError(
                field,
                f"returned {value!r} for completion {number}: values must be numbers from 0 to 1",
                value=name,
                fix="scale its values to 0 to 1, with 0 for an answer that it does not apply to; "
                "weight sets how much it counts",
            )
    return given


def _failed(error: BaseException, what: str, name: str, field: str) -> SpecError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return SpecError(
        field,
        f"{what} {type(error).__name__}{f': {error}' if str(error) else ''}{place}",
        value=name,
        fix="correct the code, and try it on a few answers before the next run",
    )

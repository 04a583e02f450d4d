"""Whether an answer is a formula that LaTeX can read."""

import re
from collections.abc import Iterator

from job.evaluation import latex
from job.evaluation.latex import commands
from job.evaluation.latex.commands import WRAPPERS

_STRUCTURE = (r"\left", r"\right", r"\middle", r"\hline", r"\cline", r"\multicolumn")
_UNALIGNED = (*WRAPPERS, "gather", "gather*", "gathered", "multline", "multline*")
"""Environments without columns; any other may have them."""
_ALIGNING = (r"\matrix", r"\pmatrix", r"\cases", r"\eqalign", r"\eqalignno")
"""Plain TeX's, whose argument may have columns."""
_COMMENT = re.compile(r"(\\[\s\S])|%[^\n]*\n?")
_PAIRS = {"}": "{", r"\right": r"\left", r"\end": r"\begin"}


def valid_latex(answer: str, reference: str) -> float:
    r"""1 if LaTeX can read the answer and it is not empty.

    Braces, dollars, `\left` and `\right`, and environments pair up; commands have their arguments;
    no base has two superscripts or two subscripts; and every command is one that the normal form
    or mathtext knows, or that the reference uses. A comment hides the rest of its line. No `#`
    stands alone, `\middle` is within `\left` and `\right`, and `&` within an environment with
    columns, unless the reference has it elsewhere too.
    """
    answer = _COMMENT.sub(r"\1", answer)
    tokens, expected = latex.tokenize(answer), latex.tokenize(reference)
    if "#" in tokens or not _middles_are_paired(tokens):
        return 0.0
    if not _tabs_are_aligned(tokens) and _tabs_are_aligned(expected):
        return 0.0
    used = set(expected)
    if not all(item in used or _known(item) for item in set(tokens)):
        return 0.0
    if tokens.count("$") % 2 or not _paired(tokens) or not _single_scripts(tokens):
        return 0.0
    return float(latex.readable(answer) and bool(latex.normalized_tokens(answer)))


def _known(token: str) -> bool:
    if not token.startswith("\\"):
        return True
    if len(token) == 1:
        return False  # a backslash at the end
    if not (token[1].isascii() and token[1].isalpha()):
        return True  # spaces, escaped characters, accents, line ends
    return token in _STRUCTURE or commands.known(token)


def _paired(tokens: tuple[str, ...]) -> bool:
    r"""Whether every opening token meets its closing one, environments by name."""
    opened: list[tuple[str, str]] = []
    for at, item in enumerate(tokens):
        name = _environment(tokens, at + 1) if item in (r"\begin", r"\end") else ""
        if item in _PAIRS.values():
            opened.append((item, name))
        elif item in _PAIRS and (not opened or opened.pop() != (_PAIRS[item], name)):
            return False
    return not opened


def _enclosing(tokens: tuple[str, ...], wanted: str) -> Iterator[tuple[str, str]]:
    r"""For each token `wanted`, the innermost token that is open there, and what belongs to it.

    That is the name of an environment, or the token before a brace.
    """
    opened: list[tuple[str, str]] = []
    for at, item in enumerate(tokens):
        if item == wanted:
            yield opened[-1] if opened else ("", "")
        elif item == r"\begin":
            opened.append((item, _environment(tokens, at + 1)))
        elif item in _PAIRS.values():
            opened.append((item, tokens[at - 1] if at else ""))
        elif item in _PAIRS and opened:
            opened.pop()


def _middles_are_paired(tokens: tuple[str, ...]) -> bool:
    return all(opening == r"\left" for opening, _ in _enclosing(tokens, r"\middle"))


def _tabs_are_aligned(tokens: tuple[str, ...]) -> bool:
    return all(
        name not in _UNALIGNED if opening == r"\begin" else name in _ALIGNING
        for opening, name in _enclosing(tokens, "&")
    )


def _environment(tokens: tuple[str, ...], at: int) -> str:
    end = tokens.index("}", at) if "}" in tokens[at:] else len(tokens)
    return "".join(tokens[at + 1 : end])


def _single_scripts(tokens: tuple[str, ...]) -> bool:
    r"""Whether no base has two superscripts, as in `x^2^3`, or two subscripts."""
    levels: list[str] = [""]  # the scripts of the current base, on each level of braces
    argument = False
    for item in tokens:
        if item in ("^", "_", "'") and not argument:
            if "^" in levels[-1] if item == "'" else item in levels[-1]:
                return False
            levels[-1] += item
            argument = item != "'"
            continue
        if not argument:
            levels[-1] = ""
        argument = False
        if item == "{":
            levels.append("")
        elif item == "}" and len(levels) > 1:
            levels.pop()
    return True

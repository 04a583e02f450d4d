r"""Random LaTeX formulas, as tokens, with exactly one label for each image.

A label can be learned from its image only if no other label renders to the same image:

- Of glyphs that look alike in one of mathtext's five fonts, only one is used. They are compared at
  equal size, as scripts change it: no `l` or `I` (`1`, `i`), `o` or `O` (`0`), `q`
  (`g`), `w` (`\omega`), `F` (`E`); of `C`, `J`, `P`, `S`, `U`, `V`, `X`, `Z` the small letter only;
  no `\epsilon` (`e`), `\eta` (`n`), `\nu` (`v`), `\rho` (`p`), `\chi` (`x`), `\kappa` (`K`),
  `\zeta` (`\xi`), `\varphi` (`\psi`), `\vartheta`, `\Theta`, `\Lambda` (`\Delta`), `\Xi`
  (`\equiv`), `\Pi`, `\Sigma` (`\sum`), `\hbar` (`h`).
- One spelling for each image: scripts and arguments always in braces, `_` before `^`, never two
  scripts of one kind, no empty group, `\leq` and `\rightarrow` but neither `\le` nor `\to`.
- Sizes are reduced at most twice: anything smaller is illegible.

A formula is built to an exact length, so that lengths are uniform; truncating or discarding long
formulas would make the limit more frequent.
"""

from collections.abc import Callable
from random import Random

VARIABLES = tuple("abcdefghijkmnprstuvxyzABDEGHKLMNQRT")
DIGITS = tuple("0123456789")
GREEK = (
    *(r"\alpha", r"\beta", r"\gamma", r"\delta", r"\theta", r"\lambda", r"\mu", r"\xi", r"\pi"),
    *(r"\sigma", r"\tau", r"\phi", r"\psi", r"\omega"),
    *(r"\Gamma", r"\Delta", r"\Phi", r"\Psi", r"\Omega", r"\partial", r"\nabla", r"\infty"),
)
OPERATORS = ("+", "-", r"\times", r"\cdot", r"\pm", "/", ",")
RELATIONS = ("=", "<", ">", r"\leq", r"\geq", r"\neq", r"\sim", r"\approx", r"\equiv")
ARROWS = (r"\rightarrow",)
FUNCTIONS = (r"\sin", r"\cos", r"\tan", r"\exp", r"\log", r"\ln")
SUMS = (r"\sum", r"\prod", r"\int")
LIMITS = (r"\lim", r"\max", r"\min")
STRUCTURE = ("^", "_", "{", "}", "(", ")", r"\frac", r"\sqrt")

VOCABULARY: tuple[str, ...] = (
    *(VARIABLES + DIGITS + GREEK + OPERATORS + RELATIONS + ARROWS),
    *(FUNCTIONS + SUMS + LIMITS + STRUCTURE),
)
"""Every token that a formula can contain."""

MIN_TOKENS = 3
_MAX_LEVEL = 2  # how often size can be reduced: scripts, limits and fractions each do it once
_SCRIPT_LENGTHS = ((1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 5, 7), (1, 1, 1, 1, 2))  # by level
_FUNCTION_NAMES = tuple(name[1:] for name in FUNCTIONS + LIMITS)


def generate(rng: Random, max_tokens: int) -> tuple[str, ...]:
    """A random formula of 3 to `max_tokens` tokens, all lengths equally likely."""
    return formula(rng, random_length(rng, max_tokens))


def random_length(rng: Random, max_tokens: int) -> int:
    """A length from 3 to `max_tokens`, or below 3 if `max_tokens` is."""
    return rng.randint(min(MIN_TOKENS, max_tokens), max_tokens)


def formula(rng: Random, length: int) -> tuple[str, ...]:
    """A random formula of exactly `length` tokens."""
    while True:
        tokens = tuple(_expression(rng, length, 0))
        # `t`, `a`, `n` side by side would differ from `\tan` only by their slant.
        if not any(name in "".join(tokens).replace("\\" + name, "\\") for name in _FUNCTION_NAMES):
            return tokens


def to_latex(tokens: tuple[str, ...]) -> str:
    r"""The label: the tokens joined, with a space only between a command and a letter.

    mathtext drops a script after a space before `^` or `_`; such a label would contain more than
    its image.
    """
    out: list[str] = []
    for token, following in zip(tokens, (*tokens[1:], ""), strict=True):
        out.append(token)
        if len(token) > 1 and token[1:].isalpha() and following[:1].isalpha():
            out.append(" ")
    return "".join(out)


def _expression(rng: Random, length: int, level: int) -> list[str]:
    """Terms joined by operators, `length` tokens in all, at size `level` (0 is full size)."""
    out: list[str] = []
    related = False  # at most one relation per formula, as on paper
    if length >= 2 and rng.random() < 0.06:
        out.append("-")
    while len(out) < length:
        out += _term(rng, length - len(out), level)
        left = length - len(out)
        if left >= 2 and rng.random() < 0.62:
            relate = not related and rng.random() < 0.4
            related = related or relate
            out.append(rng.choice(RELATIONS if relate else OPERATORS))
    return out


def _term(rng: Random, room: int, level: int) -> list[str]:
    """One term of at most `room` tokens."""
    kinds = [
        (weight * (0.5 if reduces and level else 1), build)
        for weight, shortest, reduces, build in _TERMS
        if room >= shortest and level + reduces <= _MAX_LEVEL
    ]
    weights = [weight for weight, _ in kinds]
    build = rng.choices([build for _, build in kinds], weights)[0]
    return build(rng, room, level)


def _atom(rng: Random, room: int, level: int) -> list[str]:
    kind = rng.random()
    return [rng.choice(VARIABLES if kind < 0.5 else GREEK if kind < 0.75 else DIGITS)]


def _one_script(rng: Random, room: int, level: int) -> list[str]:
    script = _script(rng, room - 4, level)
    return [*_atom(rng, 1, level), rng.choice("^_"), *script]


def _both_scripts(rng: Random, room: int, level: int) -> list[str]:
    below = _script(rng, room - 8, level)
    above = _script(rng, room - 5 - len(below), level)
    return [*_atom(rng, 1, level), "_", *below, "^", *above]


def _fraction(rng: Random, room: int, level: int) -> list[str]:
    longest = 9 if level == 0 else 3
    above = _group(rng, rng.randint(1, min(longest, room - 6)), level + 1)
    below = _group(rng, rng.randint(1, min(longest, room - 3 - len(above))), level + 1)
    return [r"\frac", *above, *below]


def _root(rng: Random, room: int, level: int) -> list[str]:
    return [r"\sqrt", *_group(rng, rng.randint(1, min(9, room - 3)), level)]


def _parenthesis(rng: Random, room: int, level: int) -> list[str]:
    inner = ["(", ")"]
    while inner[0] == "(" and inner[-1] == ")":  # nobody writes `((x))`
        inner = _expression(rng, rng.randint(1, min(9, room - 2)), level)
    closed = ["(", *inner, ")"]
    left = room - len(closed)
    if left >= 4 and level < _MAX_LEVEL and rng.random() < 0.35:
        closed += ["^", *_script(rng, left - 3, level)]
    return closed


def _function(rng: Random, room: int, level: int) -> list[str]:
    name = [rng.choice(FUNCTIONS)]
    if room >= 6 and level < _MAX_LEVEL and rng.random() < 0.25:
        name += ["^", "{", rng.choice(DIGITS[2:]), "}"]
    argument = rng.choices((_atom, _one_script, _parenthesis), (5, 2, 3))[0]
    left = room - len(name)
    return [*name, *(argument if left >= 5 and level < _MAX_LEVEL else _atom)(rng, left, level)]


def _big_operator(rng: Random, room: int, level: int) -> list[str]:
    out = [rng.choice(SUMS), "_", *_script(rng, room - 5, level)]
    if room - len(out) >= 5 and rng.random() < 0.7:
        out += ["^", *_group(rng, 1, level + 1)]
    return [*out, *_atom(rng, 1, level)]


def _limit(rng: Random, room: int, level: int) -> list[str]:
    below = [*_atom(rng, 1, level), rng.choice(ARROWS), *_atom(rng, 1, level)]
    return [rng.choice(LIMITS), "_", "{", *below, "}", *_atom(rng, 1, level)]


def _group(rng: Random, length: int, level: int) -> list[str]:
    return ["{", *_expression(rng, length, level), "}"]


def _script(rng: Random, room: int, level: int) -> list[str]:
    """A script in braces: few tokens, as on paper, at most `room` between the braces."""
    return _group(rng, min(room, rng.choice(_SCRIPT_LENGTHS[level])), level + 1)


# weight, shortest, how often its inner size is reduced, builder
_TERMS: tuple[tuple[float, int, int, Callable[[Random, int, int], list[str]]], ...] = (
    (36, 1, 0, _atom),
    (24, 5, 1, _one_script),
    (7, 9, 1, _both_scripts),
    (11, 7, 1, _fraction),
    (6, 4, 0, _root),
    (6, 3, 0, _parenthesis),
    (5, 2, 0, _function),
    (5, 7, 1, _big_operator),
    (2, 8, 1, _limit),
)

r"""LaTeX tokens, and a normal form: one spelling for all formulas that render the same.

`x^2`, `x^{2}` and `{x}^{ 2 }` are the same formula. `normalize` removes such differences:

- spacing, sizes and labels are dropped: `\,` `~` `\quad` `\hspace{…}` `\left` `\right` `\big`
  `\displaystyle` `\limits` `\label{…}` `\tag{…}` `\nonumber` and the dollars around a formula;
- synonyms become one command: `\le` is `\leq`, `\to` is `\rightarrow`, `\dfrac` is `\frac`;
- arguments and scripts get braces, other braces are dropped, and `_` comes before `^`;
- `a \over b` is `\frac{a}{b}`, `f'` is `f^{\prime}`, `\not=` is `\neq`;
- fonts are commands with an argument: `{\rm d}x` and `\text{d}x` are `\mathrm{d}x`; adjacent groups
  in one font are joined, and upright letters that spell a function are that function.

Text that cannot be parsed keeps all its tokens unchanged.
"""

from functools import lru_cache

from job.evaluation.latex.parser import Parser
from job.evaluation.latex.tokens import UnreadableError, join, tokenize, without_spacing
from job.evaluation.latex.writer import write

__all__ = ["join", "normalize", "normalized_tokens", "readable", "tokenize"]

_RECENT = 1024  # a formula is normalized for several metrics, and labels for every evaluation


def normalize(latex: str) -> str:
    """A formula's normal form; its unchanged tokens if it cannot be parsed."""
    return join(normalized_tokens(latex))


def normalized_tokens(latex: str) -> tuple[str, ...]:
    """The tokens of the normal form."""
    tokens = _parsed(latex)
    return tokenize(latex) if tokens is None else tokens


def readable(latex: str) -> bool:
    """Whether it has a normal form: braces are balanced, and commands have their arguments."""
    return _parsed(latex) is not None


@lru_cache(_RECENT)
def _parsed(latex: str) -> tuple[str, ...] | None:
    """The tokens of the normal form; None if the text cannot be parsed."""
    out: list[str] = []
    try:
        write(Parser(without_spacing(tokenize(latex))).formula(), out, 0)
    except UnreadableError:
        return None
    return tuple(out)

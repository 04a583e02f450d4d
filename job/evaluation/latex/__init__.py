r"""LaTeX formulas as tokens, and one spelling for what draws the same.

Much of LaTeX is freedom of spelling: `x^2`, `x^{2}` and `{x}^{ 2 }` are one formula. `normalize`
takes that freedom away, so that a comparison sees what a reader sees:

- spaces, sizes and names go: `\,` `~` `\quad` `\hspace{…}` `\left` `\right` `\big` `\displaystyle`
  `\limits` `\label{…}` `\tag{…}` `\nonumber` and the dollars around a formula;
- synonyms get one name: `\le` is `\leq`, `\to` is `\rightarrow`, `\dfrac` is `\frac`;
- arguments and scripts are in braces, other braces go, and `_` stands before `^`;
- `a \over b` is `\frac{a}{b}`, `f'` is `f^{\prime}`, `\not=` is `\neq`;
- fonts are commands with an argument: `{\rm d}x` and `\text{d}x` are `\mathrm{d}x`, neighbours in
  one font are joined, and the upright letters of a function's name are that function.

Text that cannot be read as LaTeX keeps its tokens, every one, as it came.
"""

from job.evaluation.latex.parser import Parser
from job.evaluation.latex.tokens import UnreadableError, join, tokenize, without_spacing
from job.evaluation.latex.writer import write

__all__ = ["join", "normalize", "normalized_tokens", "tokenize"]


def normalize(latex: str) -> str:
    """The one spelling of a formula; the tokens as they are where it cannot be read."""
    return join(normalized_tokens(latex))


def normalized_tokens(latex: str) -> tuple[str, ...]:
    """The tokens of the one spelling."""
    tokens = tokenize(latex)
    try:
        out: list[str] = []
        write(Parser(without_spacing(tokens)).formula(), out, 0)
        return tuple(out)
    except UnreadableError:
        return tokens

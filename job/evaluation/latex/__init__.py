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

from job.evaluation.latex.parser import Parser
from job.evaluation.latex.tokens import UnreadableError, join, tokenize, without_spacing
from job.evaluation.latex.writer import write

__all__ = ["join", "normalize", "normalized_tokens", "tokenize"]


def normalize(latex: str) -> str:
    """A formula's normal form; its unchanged tokens if it cannot be parsed."""
    return join(normalized_tokens(latex))


def normalized_tokens(latex: str) -> tuple[str, ...]:
    """The tokens of the normal form."""
    tokens = tokenize(latex)
    try:
        out: list[str] = []
        write(Parser(without_spacing(tokens)).formula(), out, 0)
        return tuple(out)
    except UnreadableError:
        return tokens

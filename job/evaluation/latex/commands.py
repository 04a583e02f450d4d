"""LaTeX commands: those without visible output, synonyms, and those with arguments."""

from functools import cache


def _names(text: str) -> frozenset[str]:
    return frozenset("\\" + name for name in text.split())


DROPPED = {"~", "$", "\\", *("\\" + sign for sign in " ,;:!>()[]")} | _names(
    "quad qquad enspace thinspace medspace thickspace negthinspace negmedspace negthickspace "
    "displaystyle textstyle scriptstyle scriptscriptstyle limits nolimits nonumber notag "
    "big Big bigg Bigg bigl Bigl biggl Biggl bigr Bigr biggr Biggr bigm Bigm biggm Biggm middle "
    "mathop mathbin mathrel mathord mathopen mathclose mathpunct mathinner ensuremath protect "
    "mathstrut strut relax null nobreak allowbreak noindent hfill hfil space"
)
DROPPED_WITH_ARGUMENT = _names("label tag hspace vspace")
DROPPED_WITH_LENGTH = _names("kern mkern hskip mskip")
WRAPPERS = ("equation", "equation*", "displaymath", "math")  # environments without visible output

FONTS = {
    r"\mathrm": "rm textrm text textnormal mbox hbox operatorname mathrm rmfamily",
    r"\mathbf": "bf textbf mathbf bfseries",
    r"\mathit": "it textit mathit itshape",
    r"\mathsf": "sf textsf mathsf",
    r"\mathtt": "tt texttt mathtt",
    r"\mathcal": "cal mathcal",
    r"\mathbb": "Bbb mathbb",
    r"\mathfrak": "frak mathfrak",
    r"\boldsymbol": "boldsymbol bm pmb",
}
FONT = {name: font for font, names in FONTS.items() for name in _names(names)}
SWITCHES = _names("rm bf it sf tt cal rmfamily bfseries itshape")  # until the end of the group

# The canonical name, then its synonyms.
_SAME = r"""
\leq \le; \geq \ge; \neq \ne; \rightarrow \to; \leftarrow \gets; \wedge \land; \vee \lor;
\neg \lnot; \ni \owns; \{ \lbrace; \} \rbrace; [ \lbrack; ] \rbrack; * \ast; ^ \sp; _ \sb;
| \vert \lvert \rvert \mid; \| \Vert \lVert \rVert; \dagger \dag; \ddagger \ddag;
\Longleftrightarrow \iff; \Longrightarrow \implies; \ldots \dotsc \dotso;
\cdots \dotsb \dotsm \dotsi; \frac \dfrac \tfrac \cfrac; \binom \dbinom \tbinom
"""
SYNONYMS = {
    synonym: name
    for name, *synonyms in (group.split() for group in _SAME.split(";"))
    for synonym in synonyms
}
NEGATED = {"=": r"\neq", r"\in": r"\notin", r"\ni": r"\notni", r"\equiv": r"\nequiv"}
_ONE_ARGUMENT = _names(
    "sqrt hat bar vec tilde dot ddot check breve acute grave mathring widehat widetilde overline "
    "underline overrightarrow overleftarrow overbrace underbrace boxed not pmod substack mathscr"
)
_TWO_ARGUMENTS = _names("frac binom stackrel overset underset")
ARGUMENTS = dict.fromkeys(_ONE_ARGUMENT | set(FONTS), 1) | dict.fromkeys(_TWO_ARGUMENTS, 2)
VERBATIM = _names("begin end color ref eqref")  # their argument is a name, not a formula
INFIX = {r"\over": r"\frac", r"\choose": r"\binom", r"\atop": None}
CELL_ENDS = ("&", r"\\", r"\cr")
FUNCTIONS = _names(
    "arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf "
    "limsup ln log max min sec sin sinh sup tan tanh Pr"
)
# Tokens that cannot be an argument without braces, and those that cannot follow `\left`.
NO_ARGUMENT = {"{", "}", "^", "_", "'", r"\left", r"\right", *CELL_ENDS, *INFIX} | SWITCHES
NO_DELIMITER = (NO_ARGUMENT, ARGUMENTS, FONT, VERBATIM)


def known(command: str) -> bool:
    """Whether the normal form or mathtext knows the command."""
    return command in _OWN or command[1:] in _of_mathtext()


_OWN = (
    DROPPED | DROPPED_WITH_ARGUMENT | DROPPED_WITH_LENGTH | SYNONYMS.keys() | FONT.keys()
    | SWITCHES | ARGUMENTS.keys() | VERBATIM | INFIX.keys() | {*CELL_ENDS} | FUNCTIONS
)  # fmt: skip


@cache
def _of_mathtext() -> frozenset[str]:
    from matplotlib._mathtext_data import tex2uni

    return frozenset(tex2uni)

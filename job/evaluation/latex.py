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

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\\s|\\.|\S", re.DOTALL)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LENGTH = re.compile(r"[-+]?[0-9.,]+(?:pt|em|ex|mm|cm|in|mu|pc|bp|sp)")
_DEEPEST = 48  # groups within groups; deeper text is no formula, and Python's stack is finite


def _names(text: str) -> frozenset[str]:
    return frozenset("\\" + name for name in text.split())


_DROPPED = {"~", "$", "\\", *("\\" + sign for sign in " ,;:!>()[]")} | _names(
    "quad qquad enspace thinspace medspace thickspace negthinspace negmedspace negthickspace "
    "displaystyle textstyle scriptstyle scriptscriptstyle limits nolimits nonumber notag "
    "big Big bigg Bigg bigl Bigl biggl Biggl bigr Bigr biggr Biggr bigm Bigm biggm Biggm middle "
    "mathop mathbin mathrel mathord mathopen mathclose mathpunct mathinner ensuremath protect "
    "mathstrut strut relax null nobreak allowbreak noindent hfill hfil space"
)
_DROPPED_WITH_ARGUMENT = _names("label tag hspace vspace")
_DROPPED_WITH_LENGTH = _names("kern mkern hskip mskip")
_WRAPPERS = ("equation", "equation*", "displaymath", "math")  # environments that draw nothing

_FONTS = {
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
_FONT = {name: font for font, names in _FONTS.items() for name in _names(names)}
_SWITCHES = _names("rm bf it sf tt cal rmfamily bfseries itshape")  # in force to the group's end

# The name that stays, then its synonyms.
_SAME = r"""
\leq \le; \geq \ge; \neq \ne; \rightarrow \to; \leftarrow \gets; \wedge \land; \vee \lor;
\neg \lnot; \ni \owns; \{ \lbrace; \} \rbrace; [ \lbrack; ] \rbrack; * \ast; ^ \sp; _ \sb;
| \vert \lvert \rvert \mid; \| \Vert \lVert \rVert; \dagger \dag; \ddagger \ddag;
\Longleftrightarrow \iff; \Longrightarrow \implies; \ldots \dotsc \dotso;
\cdots \dotsb \dotsm \dotsi; \frac \dfrac \tfrac \cfrac; \binom \dbinom \tbinom
"""
_SYNONYMS = {
    synonym: name
    for name, *synonyms in (group.split() for group in _SAME.split(";"))
    for synonym in synonyms
}
_NEGATED = {"=": r"\neq", r"\in": r"\notin", r"\ni": r"\notni", r"\equiv": r"\nequiv"}
_ONE_ARGUMENT = _names(
    "sqrt hat bar vec tilde dot ddot check breve acute grave mathring widehat widetilde overline "
    "underline overrightarrow overleftarrow overbrace underbrace boxed not pmod substack mathscr"
)
_TWO_ARGUMENTS = _names("frac binom stackrel overset underset")
_ARGUMENTS = dict.fromkeys(_ONE_ARGUMENT | set(_FONTS), 1) | dict.fromkeys(_TWO_ARGUMENTS, 2)
_VERBATIM = _names("begin end color ref eqref")  # their argument is a name, not a formula
_INFIX = {r"\over": r"\frac", r"\choose": r"\binom", r"\atop": None}
_CELL_ENDS = ("&", r"\\", r"\cr")
_FUNCTIONS = _names(
    "arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf "
    "limsup ln log max min sec sin sinh sup tan tanh Pr"
)
# What cannot be an argument without braces, and what cannot follow `\left`.
_NO_ARGUMENT = {"{", "}", "^", "_", "'", r"\left", r"\right", *_CELL_ENDS, *_INFIX} | _SWITCHES
_NO_DELIMITER = (_NO_ARGUMENT, _ARGUMENTS, _FONT, _VERBATIM)


def tokenize(latex: str) -> tuple[str, ...]:
    r"""Commands (`\alpha`), escaped characters (`\{`) and single characters; no white space.

    White space after a backslash is a token, `\ `, whatever kind it is; a backslash at the end of
    the text is one of its own.
    """
    return tuple("\\ " if item[-1].isspace() else item for item in _TOKEN.findall(latex))


def join(tokens: Iterable[str]) -> str:
    """Tokens side by side, with a space only where a letter follows a command."""
    out: list[str] = []
    after_command = False
    for item in tokens:
        if after_command and item[0].isascii() and item[0].isalpha():
            out.append(" ")
        out.append(item)
        after_command = _COMMAND.fullmatch(item) is not None
    return "".join(out)


def normalize(latex: str) -> str:
    """The one spelling of a formula; the tokens as they are where it cannot be read."""
    return join(normalized_tokens(latex))


def normalized_tokens(latex: str) -> tuple[str, ...]:
    """The tokens of the one spelling."""
    tokens = tokenize(latex)
    try:
        out: list[str] = []
        _write(_Parser(_filter(tokens)).formula(), out, 0)
        return tuple(out)
    except _UnreadableError:
        return tokens


class _UnreadableError(Exception):
    """Braces that do not match, an argument that is missing, or groups too deep to follow."""


def _filter(tokens: tuple[str, ...]) -> list[str]:
    """Synonyms under one name, without spacing and other commands that draw nothing."""
    out: list[str] = []
    at = 0
    while at < len(tokens):
        item = tokens[at]
        at += 1
        if item in _DROPPED_WITH_ARGUMENT:
            at = _after_group(tokens, at + (tokens[at : at + 1] == ("*",)))
        elif item in _DROPPED_WITH_LENGTH:
            length = _LENGTH.match("".join(tokens[at : at + 16]))
            at += length.end() if length else 0
        elif item not in _DROPPED:
            name = _SYNONYMS.get(item, item)
            if name != "*" or out[-1:] != [r"\operatorname"]:
                out.append(name)
    return out


def _after_group(tokens: tuple[str, ...], start: int) -> int:
    """Where the group that begins at `start` is over; `start` where none begins there."""
    if tokens[start : start + 1] != ("{",):
        return start
    depth = 0
    for at in range(start, len(tokens)):
        depth += (tokens[at] == "{") - (tokens[at] == "}")
        if depth == 0:
            return at + 1
    raise _UnreadableError


@dataclass
class _Symbol:
    """What is drawn as it stands: one token, or a command with its verbatim arguments."""

    tokens: list[str]


@dataclass
class _Group:
    """Braces that matter: around what a script belongs to, or around an infix command."""

    row: "_Row"


@dataclass
class _Call:
    name: str
    arguments: list["_Row"]
    option: "_Row | None" = None


@dataclass
class _Infix:
    name: str
    left: "_Row"
    right: "_Row"


@dataclass
class _Scripts:
    base: "_Symbol | _Group | _Call | None"
    below: "_Row" = field(default_factory=list)
    above: "_Row" = field(default_factory=list)


_Node = _Symbol | _Group | _Call | _Infix | _Scripts
_Row = list[_Node]


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    def formula(self) -> _Row:
        row = self._row((), 0)
        if self._next() is not None:
            raise _UnreadableError  # a closing brace without an opening one
        return row

    def _next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self) -> str:
        item = self._next()
        if item is None:
            raise _UnreadableError
        self._at += 1
        return item

    def _row(self, stops: tuple[str, ...], depth: int) -> _Row:
        """Everything up to a closing brace, one of `stops` or the end, which stay untaken."""
        if depth > _DEEPEST:
            raise _UnreadableError
        done: _Row = []
        cell = _Cell()
        while (item := self._next()) is not None and item != "}" and item not in stops:
            if item in _CELL_ENDS:
                _extend(done, cell.close())
                done.append(_Symbol([self._take()]))
                cell = _Cell()
            elif item in _SWITCHES:
                cell.switch(_FONT[self._take()])
            elif item in _INFIX:
                cell.split(self._take())
            elif item == r"\left":
                self._fence(cell.row, depth)
            elif item == r"\right":  # without its `\left`
                self._take()
                self._scripted(self._delimiter(), cell.row, depth)
            elif item == "{":
                self._scripted(self._braces(depth), cell.row, depth)
            elif item in ("^", "_", "'"):
                self._scripted([], cell.row, depth)
            else:
                self._scripted(self._single(depth), cell.row, depth)
        _extend(done, cell.close())
        return done

    def _braces(self, depth: int) -> _Row:
        self._take()
        row = self._row((), depth + 1)
        if self._next() != "}":
            raise _UnreadableError
        self._take()
        return row

    def _fence(self, out: _Row, depth: int) -> None:
        r"""`\left( … \right)`, whose inside is a group as far as infix commands go."""
        self._take()
        _extend(out, self._delimiter())
        _extend(out, _splice(self._row((r"\right",), depth + 1)))
        if self._next() == r"\right":
            self._take()
            self._scripted(self._delimiter(), out, depth)

    def _delimiter(self) -> _Row:
        item = self._next()
        if item is None or any(item in names for names in _NO_DELIMITER):
            return []
        self._take()
        shown = {"<": r"\langle", ">": r"\rangle"}.get(item, item)
        return [] if item == "." else [_Symbol([shown])]

    def _single(self, depth: int) -> _Row:
        """One token, with its arguments where it is a command that takes some."""
        if depth > _DEEPEST:
            raise _UnreadableError
        item = self._take()
        name = _FONT.get(item, item)
        if name in _VERBATIM:
            return self._verbatim(name)
        if name not in _ARGUMENTS:
            return [_Symbol([item])]
        option = None
        if name == r"\sqrt" and self._next() == "[":
            self._take()
            option = self._row(("]",), depth + 1)
            if self._take() != "]":
                raise _UnreadableError
        arguments = [self._argument(depth) for _ in range(_ARGUMENTS[name])]
        if name in _FONTS:
            return _in_font(name, arguments[0])
        if name == r"\not":
            match arguments[0]:
                case [_Symbol(tokens=[negated])] if negated in _NEGATED:
                    return [_Symbol([_NEGATED[negated]])]
        return [_Call(name, arguments, option or None)]

    def _argument(self, depth: int) -> _Row:
        item = self._next()
        if item == "{":
            return self._braces(depth)
        if item is None or item in _NO_ARGUMENT:
            raise _UnreadableError
        return self._single(depth + 1)

    def _verbatim(self, name: str) -> _Row:
        label = self._verbatim_group()
        environment = "".join(label[1:-1])
        if name in (r"\begin", r"\end") and environment in _WRAPPERS:
            return []
        columns: list[str] = []
        if name == r"\begin" and environment in ("array", "tabular"):
            columns = self._verbatim_group() if self._next() == "{" else ["{", "}"]
        return [_Symbol([name, *label, *columns])]

    def _verbatim_group(self) -> list[str]:
        rest = tuple(self._tokens[self._at : self._at + 256])  # no name is longer
        length = _after_group(rest, 0)
        if length == 0:
            raise _UnreadableError
        self._at += length
        return list(rest[:length])

    def _scripted(self, row: _Row, out: _Row, depth: int) -> None:
        """Adds `row` to `out`, with the scripts that follow it."""
        if self._next() not in ("^", "_", "'"):
            _extend(out, _splice(row))
            return
        scripts = _Scripts(_base(row))
        raised = lowered = False
        while (item := self._next()) in ("^", "_", "'"):
            if (item == "^" and raised) or (item == "_" and lowered):
                break  # two scripts of one kind: the second stands on its own
            self._take()
            if item == "'":
                _extend(scripts.above, [_Symbol([r"\prime"])])
            elif item == "^":
                _extend(scripts.above, self._argument(depth))
                raised = True
            else:
                scripts.below = self._argument(depth)
                lowered = True
        if scripts.above or scripts.below:
            out.append(scripts)
        else:
            _extend(out, _splice(row))


class _Cell:
    """A table's cell, or a whole group: the reach of font switches and infix commands."""

    def __init__(self) -> None:
        self.row: _Row = []
        self._font: str | None = None
        self._before_row: _Row = []  # what the fonts before the last switch hold
        self._left: _Row | None = None
        self._infix = ""

    def switch(self, font: str) -> None:
        self._flush()
        self._font = font

    def split(self, infix: str) -> None:
        if self._left is not None:
            raise _UnreadableError  # TeX finds it ambiguous, too
        self._flush()
        self._left, self._before_row, self._infix = self._before_row, [], infix

    def close(self) -> _Row:
        self._flush()
        if self._left is None:
            return self._before_row
        name = _INFIX[self._infix]
        if name is None:
            return [_Infix(self._infix, self._left, self._before_row)]
        return [_Call(name, [self._left, self._before_row])]

    def _flush(self) -> None:
        _extend(self._before_row, _in_font(self._font, self.row) if self._font else self.row)
        self.row = []


def _extend(row: _Row, nodes: _Row) -> None:
    """Adds nodes to a row; neighbours in one font become one."""
    for node in nodes:
        last = row[-1] if row else None
        if (
            isinstance(node, _Call)
            and isinstance(last, _Call)
            and node.name == last.name
            and node.name in _FONTS
        ):
            _extend(last.arguments[0], node.arguments[0])
        else:
            row.append(node)


def _in_font(font: str, row: _Row) -> _Row:
    """The row in a font, without what sets the same font again; nothing where it is empty."""
    inner: _Row = []
    for node in row:
        same = isinstance(node, _Call) and node.name == font
        _extend(inner, node.arguments[0] if same else [node])  # type: ignore[union-attr]
    return [_Call(font, [inner])] if inner else []


def _splice(row: _Row) -> _Row:
    """A group's row as part of the row around it: without braces, except around an infix."""
    return [_Group(row)] if any(isinstance(node, _Infix) for node in row) else row


def _base(row: _Row) -> _Symbol | _Group | _Call | None:
    """What a script belongs to: braces are kept around more than one thing."""
    match row:
        case []:
            return None
        case [_Symbol(tokens=[mark])] if mark in _CELL_ENDS:
            return _Group(row)
        case [(_Symbol() | _Call() | _Group()) as only]:
            return only
    return _Group(row)


def _write(row: _Row, out: list[str], depth: int) -> None:
    """Appends a row's tokens to `out`."""
    if depth > _DEEPEST:
        raise _UnreadableError
    for node in row:
        match node:
            case _Symbol(tokens):
                out += tokens
            case _Group(inner):
                _write_group(inner, out, depth)
            case _Infix(name, left, right):
                _write(left, out, depth)
                out.append(name)
                _write(right, out, depth)
            case _Scripts(base, below, above):
                if base is None:
                    out += ["{", "}"]
                else:
                    _write([base], out, depth)
                for mark, script in (("_", below), ("^", above)):
                    if script:
                        out.append(mark)
                        _write_group(script, out, depth)
            case _Call(name, arguments, option):
                _write_call(name, arguments, option, out, depth)


def _write_call(
    name: str, arguments: list[_Row], option: _Row | None, out: list[str], depth: int
) -> None:
    if name == r"\mathrm":
        letters = [node.tokens[0] for node in arguments[0] if isinstance(node, _Symbol)]
        function = "\\" + "".join(letters)
        if len(letters) == len(arguments[0]) and function in _FUNCTIONS:
            out.append(function)
            return
    out.append(name)
    if option is not None:
        inner: list[str] = []
        _write(option, inner, depth + 1)
        out += ["[", *(["{", *inner, "}"] if "]" in inner else inner), "]"]
    for argument in arguments:
        _write_group(argument, out, depth)


def _write_group(row: _Row, out: list[str], depth: int) -> None:
    out.append("{")
    _write(row, out, depth + 1)
    out.append("}")

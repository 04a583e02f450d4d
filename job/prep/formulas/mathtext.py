r"""Reads formulas for matplotlib's mathtext several times as fast as its own grammar does.

mathtext tries some twenty alternatives at every character, in Python. `Parser` reads the common
part of its grammar with one look ahead, and calls mathtext's own actions in the same order, so the
boxes, and every pixel, are the same. It leaves to mathtext what it does not cover, and refuses at
once what mathtext's grammar cannot read.

The order of calls is a detail of the matplotlib versions in `COVERED`; with any other version
everything is left to mathtext.
"""

import re
from functools import cache
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib import _mathtext
from matplotlib._mathtext_data import tex2uni
from matplotlib.ft2font import LoadFlags
from pyparsing import ParseBaseException

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.font_manager import FontProperties

COVERED = ((3, 11),)
"""The versions of matplotlib whose grammar this module follows."""
MAX_DEPTH = 12
"""Deeper groups are left to mathtext, which fails at a depth that depends on Python's stack."""
HINTING = LoadFlags.DEFAULT
"""What matplotlib's Agg backend gets for `text.hinting: default`; its import takes a quarter of a
second."""
SHARED_BY = 256
"""As many formulas share loaded glyphs, which are kept by size: their number grows slowly."""

_FAMILIES: dict[str, type[_mathtext.TruetypeFonts]] = {
    "cm": _mathtext.BakomaFonts,
    "dejavusans": _mathtext.DejaVuSansFonts,
    "dejavuserif": _mathtext.DejaVuSerifFonts,
    "stix": _mathtext.StixFonts,
    "stixsans": _mathtext.StixSansFonts,
}
_GRAMMAR = _mathtext.Parser
_CHARACTER = re.compile(r"[a-zA-Z0-9+\-*/<>=:,.;!?&@()\[\]|]")
_COMMAND = re.compile(r"\\(?:([A-Za-z]+)|(.))", re.DOTALL)
_ESCAPED = frozenset("%${}[]_|")
_UNCOVERED = re.compile(r"[^ -~]|'|\\$")
_ACCENTS = {name for name in (*_GRAMMAR._accent_map, *_GRAMMAR._wide_accents) if name.isalpha()}
_ONE_GROUP = {"overline": "body", "underline": "body"}
_TWO_GROUPS = {
    "frac": ("num", "den"), "binom": ("num", "den"),
    "overset": ("annotation", "body"), "underset": ("annotation", "body"),
}  # fmt: skip
_OTHER = re.findall(
    "[a-z]+",
    "left right middle hspace phantom llap rlap frac dfrac binom genfrac sqrt overline underline "
    "overset underset text substack operatorname boldsymbol math",
)
_NAMES = frozenset(
    name
    for name in (*tex2uni, *_ACCENTS, *_GRAMMAR._function_names, *_GRAMMAR._fontnames, *_OTHER)
    if name.isalpha()
)
# These match at the beginning of a longer name too: `\quadx` is `\quad x`.
_PREFIXES = tuple(
    f"\\{name}"
    for name in (*_OTHER, *(each[1:] for each in (*_GRAMMAR._space_widths, *_GRAMMAR._delims)))
    if name.isalpha()
)
# A script, or a command, without its argument.
_INCOMPLETE = re.compile(
    r"(?<!\\)[\^_](?:[}^_]|$)|\\(?:d?frac|binom|overline|underline)(?![A-Za-z])\s*(?:[^{\s]|$)"
)
_ELSEWHERE = re.compile(r"\\(?:text|substack)")  # what they contain is read by other rules


class _LeaveError(Exception):
    """Not covered here: mathtext decides."""


class Parser(_mathtext.Parser):
    """mathtext's parser, with a faster way for most formulas."""

    def parse(
        self, s: str, fonts_object: _mathtext.Fonts, fontsize: float, dpi: float
    ) -> _mathtext.Hlist:
        """The box of `$formula$`. Raises ValueError if mathtext cannot read it."""
        if is_covered():
            if cannot_be_read(s[1:-1]):
                raise ValueError("no formula of mathtext's grammar")
            try:
                return self._read(s[1:-1], fonts_object, fontsize, dpi)
            except ParseBaseException as error:
                raise ValueError(str(error)) from None
            except _LeaveError:
                pass
        self._needs_space_after_subsuper = False  # an earlier formula may have left it set
        return super().parse(s, fonts_object, fontsize, dpi)

    def _read(
        self, text: str, fonts: _mathtext.Fonts, fontsize: float, dpi: float
    ) -> _mathtext.Hlist:
        if _UNCOVERED.search(text):
            raise _LeaveError
        self._text, self._at, self._depth = text, 0, 0
        self._state_stack = [_mathtext.ParserState(fonts, "default", "rm", fontsize, dpi)]
        self._em_width_cache: dict[tuple[str, float, float], float] = {}
        self._needs_space_after_subsuper = False
        before = self.non_math([""])
        row = self._row("")
        if not row:
            raise _LeaveError
        formula = _mathtext.Hlist(row)
        self.pop_state()
        return _mathtext.Hlist([*before, formula, *self.non_math([""])])

    def _next(self) -> str:
        """The next character, after spaces; empty at the end."""
        while self._text[self._at : self._at + 1] == " ":
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _row(self, end: str) -> list[_mathtext.Node]:
        """Reads up to, but not including, `end`; an empty one is the end of the formula."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _LeaveError
        row: list[_mathtext.Node] = []
        while (item := self._next()) != end:
            if not item:
                raise _LeaveError
            row.append(self._space() or self._with_scripts(item))
        self._depth -= 1
        return row

    def _space(self) -> _mathtext.Node | None:
        """Reads a command for space; None if there is none here."""
        found = _COMMAND.match(self._text, self._at)
        width = found[0] if found else self._text[self._at]
        if width not in self._space_widths:
            return None
        self._at += len(width)
        return _only(self.space({"space": width}))

    def _with_scripts(self, item: str) -> _mathtext.Node:
        start, found = self._at, {}
        if item not in ("^", "_"):
            found["nucleus"] = self._single()
        scripts: list[str | _mathtext.Node] = []
        while (mark := self._next()) in ("^", "_"):
            self._at += 1
            scripts += [mark, self._single()]
        return _only(self.subsuper(self._text, start, {**found, "subsuper": scripts}))

    def _single(self) -> _mathtext.Node:
        """Reads a character, a group, or a command with its arguments."""
        start = self._at
        item = self._text[start : start + 1]
        if item == "{":
            return self._group(None)
        if item == "\\":
            return self._command()
        if not _CHARACTER.match(item):
            raise _LeaveError
        self._at += 1
        return _only(self.symbol(self._text, start, {"sym": item}))

    def _command(self) -> _mathtext.Node:
        start = self._at
        found = _COMMAND.match(self._text, start)
        if found is None:
            raise _LeaveError
        self._at = found.end()
        name, sign = found.groups()
        if found[0] in self._space_widths:
            raise _LeaveError
        if name in _ACCENTS:
            return _only(self.accent({"accent": name, "sym": self._single()}))
        if name in tex2uni or sign in _ESCAPED:
            return _only(self.symbol(self._text, start, {"sym": found[0]}))
        if name in self._function_names:
            return _only(self.function(self._text, start, {"name": name}))
        if name in _TWO_GROUPS:
            required = name in ("frac", "binom")
            read = {part: self._argument(required=required) for part in _TWO_GROUPS[name]}
            action = getattr(self, name)
            return _only(action(read) if required else action(self._text, start, read))
        if name in _ONE_GROUP:
            return _only(getattr(self, name)({_ONE_GROUP[name]: self._argument(required=True)}))
        if name == "sqrt":
            root = self._root()
            return _only(self.sqrt({"root": root, "value": self._argument(required=True)}))
        if name == "boldsymbol":
            return _only(self.boldsymbol({"value": self._braced(required=True)}))
        if name is not None and name.startswith("math") and name[4:] in self._fontnames:
            return self._group(name[4:])
        raise _LeaveError

    def _group(self, font: str | None) -> _mathtext.Node:
        if self._text[self._at : self._at + 1] != "{":
            raise _LeaveError
        self.start_group({"font": font})
        row = self._braced(required=False)
        self.end_group()
        return _only(self.group({"group": row}))

    def _argument(self, *, required: bool) -> _mathtext.Node:
        return _only(self.required_group({"group": self._braced(required=required)}))

    def _braced(self, *, required: bool) -> list[_mathtext.Node]:
        if self._text[self._at : self._at + 1] != "{":
            raise _LeaveError
        self._at += 1
        row = self._row("}")
        if required and not row:
            raise _LeaveError
        self._at += 1
        return row

    def _root(self) -> list[_mathtext.Node] | None:
        if self._text[self._at : self._at + 1] != "[":
            return None
        self._at += 1
        row = self._row("]")
        self._at += 1
        if not row:
            raise _LeaveError
        return row


def cannot_be_read(text: str) -> bool:
    r"""Whether no rule of mathtext's grammar can read the text, whatever surrounds it.

    True if braces do not pair up, and for commands and characters that no rule begins with. Every
    rule that reads `{` reads its `}`. False says nothing.
    """
    if _ELSEWHERE.search(text):
        return False
    if _INCOMPLETE.search(text):
        return True
    depth = 0
    for found in re.finditer(r"\\([A-Za-z]+)|\\(.)|[{}\"#`%]", text, re.DOTALL):
        name, sign = found.groups()
        if name is not None:
            if name not in _NAMES and not found[0].startswith(_PREFIXES):
                return True
        elif sign == "\\":
            return True
        elif sign is None:
            if found[0] not in "{}":
                return True
            depth += 1 if found[0] == "{" else -1
            if depth < 0:
                return True
    return depth != 0


def draw(latex: str, font: "FontProperties", dpi: int) -> "np.ndarray":
    """The formula's ink, (H, W) bytes, 255 where it is black.

    Raises what mathtext raises for a formula that it cannot draw.
    """
    box = _parser().parse(f"${latex}$", _fonts(font), font.get_size_in_points(), dpi)
    image: np.ndarray = _mathtext.ship(box).to_raster(antialiased=True).image
    return image


@cache
def is_covered() -> bool:
    """Whether the installed matplotlib has the grammar that `Parser` follows."""
    return mpl.__version_info__[:2] in COVERED


@cache
def _parser() -> Parser:
    """Built once: a fifth of a second."""
    return Parser()


_shared: list[tuple["FontProperties", _mathtext.Fonts, int]] = []


def _fonts(font: "FontProperties") -> _mathtext.Fonts:
    """The fonts of a formula; those of Computer Modern serve many formulas.

    Other families have kerning tables, which FreeType reads at the size of the last glyph loaded.
    """
    kind = _FAMILIES[font.get_math_fontfamily()]
    if kind is not _mathtext.BakomaFonts:
        return kind(font, HINTING)
    if _shared and _shared[0][0] == font and _shared[0][2] < SHARED_BY:
        _, fonts, count = _shared.pop()
    else:
        _shared.clear()
        fonts, count = kind(font, HINTING), 0
    _shared.append((font, fonts, count + 1))
    return fonts


def _only(nodes: _mathtext.Node | list[_mathtext.Node]) -> _mathtext.Node:
    """The node that an action made; some return it in a list."""
    if not isinstance(nodes, list):
        return nodes
    [node] = nodes
    return node

"""Boxes, arrows and text of a diagram, 480 units wide: at a phone's width its text stays readable.

A phone shows a picture of a page about 358 pixels wide, so 14 units of text are 10 pixels there.
"""

from collections.abc import Callable, Sequence
from html import escape
from textwrap import wrap

WIDTH = 480
MARGIN = 20
INK, SOFT, LINE, RED = "#1f2933", "#52606d", "#7b8794", "#b83232"
FILLS = {
    "blue": ("#e3f0fc", "#2f6fae"),
    "green": ("#e4f5ea", "#2f855a"),
    "red": ("#fde8e8", "#b83232"),
    "grey": ("#f1f3f6", "#7b8794"),
    "orange": ("#fdf0d9", "#b7791f"),
    "white": ("#ffffff", "#d9e0e6"),
    "dark": ("#1b1f26", "#1b1f26"),
}
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


class Canvas:
    """A diagram that is drawn from top to bottom."""

    def __init__(self) -> None:
        self._items: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 14,
        fill: str = SOFT,
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        """One line of text, with its baseline at `y`."""
        more = ' font-weight="600"' if bold else ""
        more += f' font-family="{MONO}"' if mono else ""
        self._items.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"'
            f"{more}>{escape(text, quote=False)}</text>"
        )

    def note(self, y: float, text: str) -> float:
        """A sentence over the whole width, in as many lines as it needs; where the next begins."""
        for line in wrap(text, 55):
            self.text(MARGIN, y, line)
            y += 20
        return y

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        kind: str,
        title: str,
        *lines: str,
        mono: bool = False,
    ) -> None:
        """A box with a title and lines below it, centred."""
        fill, stroke = FILLS[kind]
        self._items.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9"'
            f' fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
        )
        step, titled = 19, bool(title)
        top = y + (height - step * (len(lines) + titled)) / 2 + 14
        middle = x + width / 2
        if title:
            ink = "#d6dce4" if kind == "dark" else INK
            self.text(middle, top, title, size=15, fill=ink, anchor="middle", bold=True, mono=mono)
        for number, line in enumerate(lines, titled):
            self.text(middle, top + step * number, line, anchor="middle")

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A plain rectangle: a part of a matrix."""
        fill, stroke = FILLS[kind]
        self._items.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"'
            f' stroke="{stroke}" stroke-width="1.5"/>'
        )

    def frame(self, x: float, y: float, width: float, height: float, stroke: str = LINE) -> None:
        """A dashed frame around what is already drawn, or will be."""
        self._items.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9" fill="none"'
            f' stroke="{stroke}" stroke-width="1.5" stroke-dasharray="5 4"/>'
        )

    def arrow(self, path: str, *, both: bool = False, red: bool = False, tip: bool = True) -> None:
        """A line along an SVG path, with a tip at its end."""
        marker = "red" if red else "tip"
        ends = f' marker-end="url(#{marker})"' if tip else ""
        ends += f' marker-start="url(#{marker})"' if both else ""
        colour = RED if red else LINE
        dashes = ' stroke-dasharray="4 3"' if red else ""
        self._items.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}{ends}/>'
        )

    def svg(self, height: float, title: str, description: str) -> str:
        """The whole picture, on a white card that is readable on dark pages too."""
        tips = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7"'
            f' markerHeight="7" orient="auto-start-reverse">'
            f'<path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>'
            for name, colour in (("tip", LINE), ("red", RED))
        )
        words = [escape(each, quote=False) for each in (title, description)]
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}"'
            f' width="{WIDTH}" height="{height:g}" role="img" aria-labelledby="title desc"'
            f' font-family="{SANS}">',
            f'<title id="title">{words[0]}</title>',
            f'<desc id="desc">{words[1]}</desc>',
            f"<defs>{tips}</defs>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="14"'
            ' fill="#ffffff" stroke="#d9e0e6"/>',
            *self._items,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


Diagram = Callable[[Canvas], str]
Rows = Sequence[tuple[str, ...]]

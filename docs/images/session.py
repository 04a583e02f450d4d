"""Records docs/images/session.svg: commands on a real terminal, and what they really say.

    make session             all of it, on a machine that does nothing else
    make session ARGS=1      the first command alone, in seconds; the others stay as recorded

A mistake in a spec; a short trial of the first job, stopped by Ctrl-C; the same command again.
"""

import html
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from tests.jobs import ROOT
from tests.terminal import on_terminal

PICTURE = ROOT / "docs" / "images" / "session.svg"
COLUMNS = 100
CELL = 12.2  # width of a character in the picture
RUN = "python -m job run specs/latex.yaml --set train.max_steps=40 --set data.train.limit=1000"
SESSION = (
    ("python -m job validate specs/latex.yaml --set train.learning_rte=1 --set lora.r=0", None),
    (RUN, "10/40"),  # Ctrl-C when the bar is there
    (RUN, None),
)

THEME = TerminalTheme(
    (27, 31, 38),
    (214, 220, 228),
    [
        (27, 31, 38), (240, 113, 120), (140, 200, 130), (232, 191, 106),
        (110, 168, 254), (199, 146, 234), (110, 200, 200), (214, 220, 228),
    ],
)  # fmt: skip

# Rich's own frame fetches a font from the web; this one takes what the reader has.
FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" xml:space="preserve" role="img" aria-label="A recorded terminal session">
  <style>
    .{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px; line-height: {line_height}px; white-space: pre; }}
    .{unique_id}-title {{ font-family: system-ui, sans-serif; font-size: 15px; }}
    {styles}
  </style>
  <defs>
    <clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
    {lines}
  </defs>
  {chrome}
  <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">{matrix}</g>
  </g>
</svg>
"""  # noqa: E501


def main(anew: Sequence[str]) -> None:
    """Records the commands with these numbers, counted from 1; all of them without any."""
    kept = recorded(PICTURE.read_text(encoding="utf-8")) if anew else []
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "specs").symlink_to(ROOT / "specs")
        blocks = [
            kept[number] if anew and str(number + 1) not in anew else record(*step, Path(home))
            for number, step in enumerate(SESSION)
        ]
    PICTURE.write_text(drawn(blocks), encoding="utf-8")


def record(command: str, interrupt_at: str | None, home: Path) -> list[Text]:
    """The lines of the command and of what it says."""
    shown = on_terminal(
        command.split(),
        columns=COLUMNS,
        cwd=home,
        environ={
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
        interrupt_at=interrupt_at,
        seconds=1800,
    )
    typed = Text.assemble(("$ ", "bold green"), (command, "bold"))
    return [typed, *map(Text.from_ansi, screen(shown.text)), Text()]


def drawn(blocks: Sequence[Sequence[Text]]) -> str:
    """The picture of the recorded commands, one below the other."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False
    )
    for line in (line for block in blocks for line in block):
        console.print(line, soft_wrap=False)
    picture = console.export_svg(
        title="finetune-job", theme=THEME, code_format=FRAME, unique_id="s"
    )
    return "\n".join(line.rstrip() for line in picture.splitlines()) + "\n"


def recorded(picture: str) -> list[list[Text]]:
    """The lines that a picture shows, by command: what was recorded and is to stay."""
    styles = {
        name: Style(color=fill, bold="bold" in more)
        for name, fill, more in re.findall(r"\.(s-r\d+) \{ fill: (#\w{6})(.*?) \}", picture)
    }
    rows: dict[str, Text] = {}
    for name, x, y, shown in re.findall(
        r'<text class="(s-r\d+)" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', picture
    ):
        row = rows.setdefault(y, Text())
        if shown.strip("\n"):  # the line's end has an element of its own, and runs of spaces none
            row.append(" " * (round(float(x) / CELL) - row.cell_len))
            row.append(html.unescape(shown).replace("\xa0", " "), styles[name])
    blocks: list[list[Text]] = []
    for row in rows.values():
        if row.plain.startswith("$ python"):
            blocks.append([])
        blocks[-1].append(row)
    return blocks


def screen(text: str) -> list[str]:
    """The lines that are left to see: what bars drew over, and how they moved, is gone."""
    lines, row = [""], 0
    for part in re.split(r"(\n|\r|\x1b\[2K|\x1b\[1A|\x1b\[\?25[lh])", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row = max(0, row - 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part != "\r" and not part.startswith("\x1b[?"):
            lines[row] += part
    while lines and not re.sub(r"\x1b\[[\d;]*m", "", lines[-1]).strip():
        lines.pop()
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    main(sys.argv[1:])

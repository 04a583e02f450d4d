"""Records docs/images/session.svg: commands on a real terminal, and what they really say.

    make session

A mistake in a spec; a short trial of the first job, stopped by Ctrl-C; the same command again.
"""

import io
import os
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from tests.jobs import ROOT
from tests.terminal import on_terminal

COLUMNS = 100
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


def main() -> None:
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False
    )
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "specs").symlink_to(ROOT / "specs")
        for command, interrupt_at in SESSION:
            shown = on_terminal(
                command.split(),
                columns=COLUMNS,
                cwd=Path(home),
                environ={
                    "HOME": home,
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "PYTHONPATH": str(ROOT),
                },
                interrupt_at=interrupt_at,
                seconds=1800,
            )
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            for line in screen(shown.text):
                console.print(Text.from_ansi(line), soft_wrap=False)
            console.print()
    picture = console.export_svg(
        title="finetune-job", theme=THEME, code_format=FRAME, unique_id="s"
    )
    (ROOT / "docs" / "images" / "session.svg").write_text(
        "\n".join(line.rstrip() for line in picture.splitlines()) + "\n", encoding="utf-8"
    )


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
    main()

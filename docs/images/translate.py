"""Draws the Chinese version of each diagram: its shapes, with the words of zh.json.

    python -m docs.images.translate        (`make diagrams`)

A diagram is translated if zh.json has a table for it. Each of its texts must be in the table, or in
the list `same`, which holds code and names that stay as they are.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent
_WORDS: Any = json.loads((IMAGES / "zh.json").read_text(encoding="utf-8"))
SAME: list[str] = _WORDS.pop("same")
TABLES: dict[str, dict[str, str]] = _WORDS
FONTS = "'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', 'WenQuanYi Micro Hei', sans-serif"
TEXT = re.compile(r"""(?<=>)[^<>]+(?=</(?:text|title|desc|tspan)>)|(?<=aria-label=")[^"]+""")


def texts(svg: str) -> list[str]:
    """What a reader can read in a diagram, or have read to them."""
    return [html.unescape(text) for text in TEXT.findall(svg)]


def translated(name: str) -> str:
    """The Chinese version of a diagram. Raises KeyError for a text without a translation."""
    words = TABLES[name]

    def chinese(found: re.Match[str]) -> str:
        text = html.unescape(found[0])
        return html.escape(text if text in SAME else words[text], quote=False)

    svg = (IMAGES / name).read_text(encoding="utf-8")
    return TEXT.sub(chinese, svg).replace("sans-serif", FONTS, 1)


def main() -> None:
    folder = IMAGES / "zh"
    folder.mkdir(exist_ok=True)
    for name in TABLES:
        (folder / name).write_text(translated(name), encoding="utf-8")


if __name__ == "__main__":
    main()

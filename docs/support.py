"""Writes the tables of docs/17-support.md, from docs/support.yaml and the results that it names.

    make support

Each cell names a test or a result, or says that it was not run. Columns of GPUs fill themselves
from benchmarks/results/parity-cuda.json and parity-rocm.json, which `make parity` measures.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "docs" / "support.yaml"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {"en": ROOT / "docs" / "17-support.md", "zh": ROOT / "docs" / "zh" / "17-support.md"}
"""The page of each language; one that does not exist is not written."""
UP = {"en": "..", "zh": "../.."}
"""From a page to the root."""
PARITY = {2: "cuda", 3: "rocm"}
"""The parity result that fills a column of the devices' table; the first, 0, has the names."""
KEYS = ("test", "result", "refused", "unneeded", "text", "note")

Texts = str | Mapping[str, str]
"""A text that all languages share, or one for each."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes cells in one language."""

    language: str
    states: Mapping[str, Mapping[str, str]]

    def text(self, texts: Texts) -> str:
        return texts if isinstance(texts, str) else texts[self.language]

    def table(self, name: str, table: Mapping[str, Any]) -> str:
        lines = [[self.text(head) for head in table["head"]]]
        lines.append(["---"] * len(lines[0]))
        for row in table["rows"]:
            cells = (
                self.cell(row, cell, PARITY.get(column) if name == "devices" else None)
                for column, cell in enumerate(row["cells"], start=1)
            )
            lines.append([self.text(row["what"]), *cells])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def cell(self, row: Mapping[str, Any], cell: Mapping[str, Any], kind: str | None) -> str:
        if not set(cell) <= set(KEYS):
            raise ValueError(
                f"{CELLS.name}: {row['what']}: a cell has one of {', '.join(KEYS)}: {cell}"
            )
        note = self.text(cell.get("note", ""))
        if "text" in cell or "unneeded" in cell:
            return self.text(cell.get("text", cell.get("unneeded")))
        if "test" in cell:
            return self._noted(self._link("tested", cell["test"]), note)
        if "refused" in cell:
            return self._noted(self._link("refused", cell["refused"]), note)
        if "result" in cell:
            return self._noted(self._ran(cell["result"], device(cell["result"])), note)
        if kind is not None and (found := parity_device(kind, row.get("parity"))) is not None:
            return self._ran(f"parity-{kind}", found)  # notes are about what was not run
        by_hand = row.get("by_hand")
        opening, closing = "（）" if self.language == "zh" else (" (", ")")
        named = f"{opening}{self._link('by_hand', by_hand)}{closing}" if by_hand else ""
        return self._noted(self.states["not_run"][self.language] + named, note)

    def _noted(self, text: str, note: str) -> str:
        colon = "：" if self.language == "zh" else ": "
        return f"{text}{colon}{note}" if note else text

    def _ran(self, result: str, on: str) -> str:
        shown = self.states["ran"][self.language].format(device=on)
        return f"[{shown}]({UP[self.language]}/benchmarks/results/{result}.json)"

    def _link(self, state: str, test: str) -> str:
        file, _, name = test.partition("::")
        return f'[{self.states[state][self.language]}]({UP[self.language]}/{file} "{name}")'


def device(result: str) -> str:
    """The device that a result names."""
    return str(json.loads((RESULTS / f"{result}.json").read_text())["device"])


def parity_device(kind: str, row: str | None, results: Path = RESULTS) -> str | None:
    """The device on which the parity result of the kind shows that the row ran; None if it does
    not."""
    path = results / f"parity-{kind}.json"
    if row is None or not path.is_file():
        return None
    found = json.loads(path.read_text())
    return str(found["device"]) if row in found["ran"] else None


@cache
def declared() -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = yaml.safe_load(CELLS.read_text(encoding="utf-8"))
    return loaded


def tests(tables: Mapping[str, Any]) -> Sequence[str]:
    """Every test that a cell or a row names."""
    rows = [row for table in tables.values() for row in table["rows"]]
    named = [row["by_hand"] for row in rows if "by_hand" in row]
    cells = [cell for row in rows for cell in row["cells"]]
    return named + [cell[key] for cell in cells for key in ("test", "refused") if key in cell]


def page(language: str, text: str) -> str:
    """The page with its tables written anew; they stand between markers.

    Raises ValueError if a table has no place on the page.
    """
    writer = Writer(language=language, states=declared()["states"])
    for name, table in declared()["tables"].items():
        begin, end = f"<!-- support: {name} -->\n", "<!-- /support -->"
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        written = begin + writer.table(name, table) + end
        text, count = re.subn(pattern, written.replace("\\", r"\\"), text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(
                f"the page has {count} places for the table {name}: write {begin}{end}"
            )
    return text


def main() -> None:
    for language, path in PAGES.items():
        if path.is_file():
            path.write_text(page(language, path.read_text(encoding="utf-8")), encoding="utf-8")
            print(path.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    main()

"""The Chinese diagrams are the English ones with other words, and none is forgotten."""

import re
from pathlib import Path

import pytest

from docs.images import canvas, diagrams, translate
from tests.unit.project.test_translations import PAGES, english_of, name_of

IMAGES = translate.IMAGES


@pytest.mark.parametrize("name", translate.TABLES)
def test_a_chinese_diagram_is_what_its_table_makes_of_the_english_one(name: str) -> None:
    english = translate.texts((IMAGES / name).read_text(encoding="utf-8"))
    known = {*translate.TABLES[name], *translate.SAME}
    missing = [text for text in english if text not in known]
    assert not missing, f"docs/images/zh.json, {name}: no Chinese for {missing}"
    stale = [text for text in translate.TABLES[name] if text not in english]
    assert not stale, f"docs/images/zh.json, {name}: not in the diagram any more: {stale}"
    drawn = (IMAGES / "zh" / name).read_text(encoding="utf-8")
    assert drawn == translate.translated(name), "draw it again: make diagrams"


def test_no_chinese_diagram_is_left_over() -> None:
    assert {path.name for path in (IMAGES / "zh").iterdir()} == set(translate.TABLES)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_diagram_of_a_pair_of_pages_is_in_both_languages(page: Path) -> None:
    """Recordings of the program, such as session.svg, are in the language that it speaks."""
    shown = re.findall(r"\]\((?:\S*/)?(\w[\w-]*\.svg)\)", english_of(page).read_text())
    missing = set(shown) - set(translate.TABLES) - {"session.svg"}
    assert not missing, f"docs/images/zh.json has no words for {sorted(missing)}, shown by {page}"


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_a_diagram_is_what_its_program_draws_and_readable_on_a_phone(name: str) -> None:
    drawn = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == diagrams.DIAGRAMS[name](canvas.Canvas()), "draw it again: make diagrams"
    smallest = min(map(float, re.findall(r'font-size="([\d.]+)"', drawn)))
    phone = 390 - 2 * 16  # pixels of a picture beside a page's margins
    assert smallest * phone / canvas.WIDTH > 9

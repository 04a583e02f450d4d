"""A page and its Chinese version say the same: code, headings, numbers, links, figures.

To mend a failure, read its line: it names the page, the heading in both languages, and what one of
the two has and the other lacks. Prose is free; what is compared is what a reader would copy, click
or rely on.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.jobs import ROOT

DOCS, CHINESE = ROOT / "docs", ROOT / "docs" / "zh"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[^\n]*$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^(#+) +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"""\]\(([^)\s]+)(?: "[^"]*")?\)""")
SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
COMMENT = re.compile(r"\s*(?<!\S)#(?![{!]).*$", re.MULTILINE)
PLACEHOLDER = re.compile(r"<[^<>\n]+>")
"""Says in words what to write there, as in `<package index>`."""
NUMBER = re.compile(r"(?:[A-Za-z]+-?)?\d+(?:[,.]\d+)*[A-Z]?")
"""With what stands before and behind it, as in H200 or 28B."""
CODE = ("bash", "console", "yaml", "json", "python", "jinja")
"""Languages of blocks that are held to be the same, but for comments; other blocks have prose."""


def chinese_of(page: Path) -> Path:
    """Where the Chinese version of an English page is, or would be."""
    if page.parent == DOCS:
        return CHINESE / page.name
    return page.with_suffix(".zh.md")


def english_of(page: Path) -> Path:
    """The English page of a Chinese one, and any other page itself."""
    if page.parent == CHINESE:
        return DOCS / page.name
    return page.with_name(page.name.replace(".zh.md", ".md"))


PAGES = sorted([*ROOT.glob("*.zh.md"), *CHINESE.glob("*.md")])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_pair = pytest.mark.parametrize("page", PAGES, ids=name_of)


@dataclass(frozen=True, kw_only=True)
class Section:
    """What stands between one heading and the next."""

    level: int
    title: str
    code: list[str]
    """Blocks of code, without comments."""
    prose: str


def sections(page: Path) -> list[Section]:
    """The sections of a page; the first one is what stands before any heading."""
    blocks: list[str] = []

    def take(block: re.Match[str]) -> str:
        language, code = block.groups()
        if language in CODE:
            blocks.append(PLACEHOLDER.sub("<>", COMMENT.sub("", code)).strip())
        return f"\0{len(blocks) - 1}\0" if language in CODE else ""

    text = FENCE.sub(take, page.read_text(encoding="utf-8"))
    level, title, start = 0, "(top)", 0
    found: list[Section] = []
    for heading in [*HEADING.finditer(text), None]:
        body = text[start : heading.start() if heading else len(text)]
        code = [blocks[int(number)] for number in re.findall("\0(\\d+)\0", body)]
        prose = re.sub("\0\\d+\0", "", body)
        found.append(Section(level=level, title=title, code=code, prose=prose))
        if heading:
            level, title, start = len(heading[1]), heading[2], heading.end()
    return found


def pairs(page: Path) -> Iterator[tuple[str, Section, Section]]:
    """The sections of a Chinese page beside those of its original, with a name for both."""
    for chinese, english in zip(sections(page), sections(english_of(page)), strict=False):
        name = f"{name_of(page)}: under “{chinese.title}” (English: “{english.title}”)"
        yield name, chinese, english


def differences(name: str, what: str, chinese: Iterable[str], english: Iterable[str]) -> list[str]:
    """A line for whatever one of the two has more often than the other."""
    here, there = Counter(chinese), Counter(english)
    lines = []
    for only, language in (((here - there), "Chinese"), ((there - here), "English")):
        if only:
            lines.append(f"{name}: {what} only in {language}: {', '.join(sorted(only.elements()))}")
    return lines


def told(problems: list[str]) -> str:
    return "\n" + "\n".join(problems)


@every_pair
def test_a_chinese_page_has_an_english_one(page: Path) -> None:
    assert english_of(page).exists(), f"{name_of(page)} has no {name_of(english_of(page))}"


@every_pair
def test_the_two_link_to_each_other_at_their_top(page: Path) -> None:
    """Within five lines, as `[中文](…)` and `[English](…)`, alone or among other links."""
    for one, other, label in (
        (page, english_of(page), "English"),
        (english_of(page), page, "中文"),
    ):
        top = "\n".join(one.read_text(encoding="utf-8").splitlines()[:5])
        link = f"[{label}]({os.path.relpath(other, one.parent)})"
        assert link in top, f"{name_of(one)}: the first five lines need {link}"


@every_pair
def test_the_two_have_the_same_headings(page: Path) -> None:
    problems = []
    for chinese, english in zip_longest(sections(page), sections(english_of(page))):
        if chinese is None or english is None or chinese.level != english.level:
            here, there = (
                "nothing" if one is None else f"“{'#' * one.level} {one.title}”"
                for one in (chinese, english)
            )
            problems.append(f"{name_of(page)}: {here} stands where the English page has {there}")
            break  # what follows is displaced
    assert not problems, told(problems)


@every_pair
def test_the_two_have_the_same_code(page: Path) -> None:
    problems = []
    for name, chinese, english in pairs(page):
        if len(chinese.code) != len(english.code):
            counts = f"{len(chinese.code)} blocks of code, English {len(english.code)}"
            problems.append(f"{name}: Chinese has {counts}")
        for here, there in zip(chinese.code, english.code, strict=False):
            if here != there:
                problems += differences(name, "lines", here.splitlines(), there.splitlines()) or [
                    f"{name}: the order of lines differs in the block “{here.splitlines()[0]}”"
                ]
    assert not problems, told(problems)


def spans(section: Section) -> set[str]:
    """Code within sentences, on one line each, without placeholders."""
    found = {" ".join(code.split()) for _, code in SPAN.findall(section.prose)}
    return {PLACEHOLDER.sub("<>", code) for code in found}


@every_pair
def test_the_two_name_the_same_commands_keys_and_messages(page: Path) -> None:
    """Code within sentences; how often it is named is free."""
    problems = []
    for name, chinese, english in pairs(page):
        problems += differences(name, "code", spans(chinese), spans(english))
    assert not problems, told(problems)


def numbers(section: Section) -> list[str]:
    """Numbers in sentences, but for those in code and in the targets of links."""
    return NUMBER.findall(SPAN.sub("", LINK.sub("]", section.prose)))


@every_pair
def test_the_two_have_the_same_numbers(page: Path) -> None:
    """Digits stay digits: 10 分钟 for 10 minutes, 十分之一 for a tenth."""
    problems = []
    for name, chinese, english in pairs(page):
        problems += differences(name, "numbers", numbers(chinese), numbers(english))
    assert not problems, told(problems)


def anchors(page: Path) -> dict[str, str]:
    """The anchor that GitHub gives to each heading, with the heading's number."""
    found: dict[str, str] = {}
    for number, section in enumerate(sections(page)):
        plain = re.sub(r"[^\w\- ]", "", section.title.lower()).replace(" ", "-")
        found.setdefault(plain, str(number))
    return found


def target(link: str, page: Path) -> str:
    """What a link leads to, in words that are the same in both languages."""
    if "://" in link:
        return re.sub(r"/(zh|zh-cn|en)(?=/)", "", link)  # the same page of a bilingual site
    path, _, anchor = link.partition("#")
    file = (page.parent / path).resolve() if path else page
    if anchor:
        anchor = f"#{anchors(file).get(anchor, anchor)}"
    if file.suffix == ".svg":
        file = DOCS / "images" / file.name
    return f"{os.path.relpath(english_of(file), ROOT)}{anchor}"


@every_pair
def test_the_two_link_to_the_same(page: Path) -> None:
    """A link to a section counts by the section's place: anchors are in the page's language."""
    problems = []
    for name, chinese, english in pairs(page):
        here, there = (
            [target(link, of) for link in LINK.findall(section.prose) if not _switch(link, of)]
            for section, of in ((chinese, page), (english, english_of(page)))
        )
        problems += differences(name, "links", here, there)
    assert not problems, told(problems)


def _switch(link: str, page: Path) -> bool:
    """Whether a link leads to the same page, in the other language or this one."""
    path = link.partition("#")[0]
    return bool(path) and english_of((page.parent / path).resolve()) == english_of(page)


@every_pair
def test_a_chinese_page_links_to_chinese_pages_and_figures_where_there_are_any(page: Path) -> None:
    problems = []
    for section in sections(page):
        for link in LINK.findall(section.prose):
            file = (page.parent / link.partition("#")[0]).resolve()
            if "://" in link or link.startswith("#") or _switch(link, page):
                continue
            better = chinese_of(file)
            if file.suffix == ".svg":
                better = DOCS / "images" / "zh" / file.name
            if file.suffix in (".md", ".svg") and better != file and better.exists():
                name = f"{name_of(page)}: under “{section.title}”"
                problems.append(
                    f"{name}: {link} is in Chinese: {os.path.relpath(better, page.parent)}"
                )
    assert not problems, told(problems)

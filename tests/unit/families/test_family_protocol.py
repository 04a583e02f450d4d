"""`docs/04-your-own-family.md` lists the family protocol, part by part and member by member."""

import re
from pathlib import Path
from typing import Protocol

import pytest

from job.families import FAMILIES
from job.families.auto import AutoFamily
from job.families.base import Family
from job.families.bound import BoundFamily
from tests.jobs import ROOT

PARTS = {part.__name__: part for part in Family.__mro__ if part not in (Family, Protocol)}
PAGE: Path = ROOT / "docs" / "04-your-own-family.md"


def members(part: type) -> set[str]:
    own = {*vars(part), *vars(part).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")}


def documented() -> dict[str, dict[str, str]]:
    """By section, each member with its mark."""
    _, *sections = re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        section.partition("\n")[0]: dict(re.findall(r"^\| `(\w+)` \| (.?) ?\|", section, re.M))
        for section in sections
    }


def test_the_protocol_is_the_sum_of_its_parts() -> None:
    assert not members(Family)
    names = [name for part in PARTS.values() for name in members(part)]
    assert len(names) == len({*names})


def test_the_page_lists_every_part_and_every_member() -> None:
    parts = {name: members(part) for name, part in PARTS.items() if members(part)}
    assert {name: {*listed} for name, listed in documented().items()} == parts


def test_the_page_marks_what_the_base_classes_implement() -> None:
    for listed in documented().values():
        for name, mark in listed.items():
            assert (mark != "") == _implements(AutoFamily, name), name
            assert (mark == "○") == _implements(BoundFamily, name), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_every_member(family: type[Family]) -> None:
    for part in PARTS.values():
        for name in members(part) - {"processor"}:
            assert hasattr(family, name), name


def _implements(base: type, name: str) -> bool:
    if name == "processor":  # set by the base class's constructor
        return True
    value = getattr(base, name, None)
    return value is not None and not getattr(value, "__isabstractmethod__", False)

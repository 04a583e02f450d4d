"""The recorded session of the README."""

from pathlib import Path

from docs.images.session import PICTURE, SESSION, drawn, record, recorded
from tests.jobs import ROOT


def test_what_is_read_of_the_picture_draws_it_again_to_the_byte() -> None:
    picture = PICTURE.read_text(encoding="utf-8")
    assert drawn(recorded(picture)) == picture


def test_the_picture_has_the_commands_that_are_recorded() -> None:
    typed = [block[0].plain for block in recorded(PICTURE.read_text(encoding="utf-8"))]
    assert typed == [f"$ {command}" for command, _ in SESSION]


def test_the_picture_ends_as_a_run_does() -> None:
    end = "".join(line.plain for line in recorded(PICTURE.read_text(encoding="utf-8"))[-1][-4:])
    assert "report.html" in end
    assert "ask the model" in end
    assert " -m job infer specs/latex.yaml" in end


def test_what_validate_says_in_the_picture_is_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    shown, *_ = recorded(PICTURE.read_text(encoding="utf-8"))
    now, *_ = recorded(drawn([record(*SESSION[0], tmp_path)]))
    assert [line.plain.rstrip() for line in shown] == [line.plain.rstrip() for line in now]

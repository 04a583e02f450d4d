"""What an error says to do about a path of this machine."""

from pathlib import Path

import pytest

from job import storage
from job.errors import InputError


def _fix(uri: Path | str, *, write: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        storage.write_text(str(uri), "") if write else storage.read_text(str(uri))
    return str(caught.value.problems[0].fix)


@pytest.mark.parametrize("typed", ["specs/latx.yaml", "spec/latex.yaml"])
def test_a_similar_path_that_exists_is_proposed(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("specs").mkdir()
    Path("specs/latex.yaml").touch()
    assert _fix(typed) == "write specs/latex.yaml, if that is meant"


def test_where_the_path_ends_is_said(tmp_path: Path) -> None:
    assert f"there is no nothing in {tmp_path};" in _fix(tmp_path / "nothing" / "like" / "it.yaml")


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    said = f"name another path: {file} is a file, not a folder"
    assert _fix(file / "spec.yaml") == said
    assert _fix(file / "output" / "run.json", write=True) == said


def test_a_folder_where_a_file_should_be_is_said(tmp_path: Path) -> None:
    assert _fix(tmp_path) == "name a file in this folder"

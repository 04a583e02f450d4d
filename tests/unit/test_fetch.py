"""`job fetch` brings what a run wrote, and nothing else."""

import hashlib
from pathlib import Path

import pytest

from job.errors import InputError
from job.fetch import fetch


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with two files of merged weights, and an adapter."""
    output = tmp_path / "run"
    files = {
        "merged/config.json": b"{}",
        "merged/sub/model.safetensors": b"weights",
        "adapter/adapter.safetensors": b"adapter",
    }
    for path, content in files.items():
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (output / path).write_bytes(content)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {path}" for path, content in files.items()]
    (output / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    (output / "_SUCCESS").touch()
    return output


def test_a_part_comes_whole_and_alone(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    assert fetch(str(run), "merged", target) == 2
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {"config.json", "sub/model.safetensors"}
    assert (target / "sub/model.safetensors").read_bytes() == b"weights"


def test_what_is_there_and_whole_is_not_brought_again(run: Path, tmp_path: Path) -> None:
    fetch(str(run), "merged", tmp_path)
    before = (tmp_path / "config.json").stat().st_mtime_ns
    (tmp_path / "sub/model.safetensors").write_bytes(b"broken!")
    fetch(str(run), "merged", tmp_path)
    assert (tmp_path / "config.json").stat().st_mtime_ns == before
    assert (tmp_path / "sub/model.safetensors").read_bytes() == b"weights"


def test_a_file_that_the_run_did_not_write_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "merged/config.json").write_bytes(b'{"evil": 1}')
    with pytest.raises(InputError, match="SHA-256 differs"):
        fetch(str(run), "merged", tmp_path / "weights")
    assert not (tmp_path / "weights" / "config.json").exists()


def test_an_unfinished_run_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="not finished"):
        fetch(str(run), "merged", tmp_path / "weights")


def test_a_missing_part_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such part"):
        fetch(str(run), "merged-vllm", tmp_path / "weights")

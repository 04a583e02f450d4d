"""`job fetch` brings what a run wrote, and nothing else."""

import hashlib
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from job.cli.fetch import fetch
from job.errors import InputError


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


def files(directory: Path) -> dict[str, bytes]:
    """What a loader finds: all but hidden files."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.relative_to(directory).as_posix().startswith(".")
    }


def another_run(place: Path, **content: bytes) -> str:
    """A finished run with other merged weights: three files, none in a folder below."""
    names = ("config.json", "model.safetensors.index.json", "model-1.safetensors")
    made = {name: content.get(name.partition(".")[0], b"new " + name.encode()) for name in names}
    (place / "merged").mkdir(parents=True)
    for name, each in made.items():
        (place / "merged" / name).write_bytes(each)
    sums = [f"{hashlib.sha256(each).hexdigest()}  merged/{name}" for name, each in made.items()]
    (place / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    (place / "_SUCCESS").touch()
    return str(place)


def test_a_part_comes_whole_and_alone(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    assert fetch(str(run), "merged", target) == 2
    assert files(target).keys() == {"config.json", "sub/model.safetensors"}
    assert (target / "sub/model.safetensors").read_bytes() == b"weights"


def test_the_adapter_of_a_reinforced_run_is_the_reinforced_one(run: Path, tmp_path: Path) -> None:
    reinforced = run / "reinforced" / "adapter" / "adapter.safetensors"
    reinforced.parent.mkdir(parents=True)
    reinforced.write_bytes(b"reinforced")
    digest = hashlib.sha256(b"reinforced").hexdigest()
    with (run / "SHA256SUMS").open("a") as sums:
        sums.write(f"{digest}  reinforced/adapter/adapter.safetensors\n")
    assert fetch(str(run), "adapter", tmp_path / "adapter") == 1
    assert files(tmp_path / "adapter") == {"adapter.safetensors": b"reinforced"}


def test_what_is_there_and_whole_is_not_brought_again(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    fetch(str(run), "merged", target)
    before = (target / "config.json").stat().st_mtime_ns
    (target / "sub/model.safetensors").write_bytes(b"broken!")
    fetch(str(run), "merged", target)
    assert (target / "config.json").stat().st_mtime_ns == before
    assert (target / "sub/model.safetensors").read_bytes() == b"weights"


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
    with pytest.raises(InputError, match=r"(?s)no such part.*--part may be adapter, merged"):
        fetch(str(run), "merged-vllm", tmp_path / "weights")


def test_a_part_may_be_written_with_a_slash_behind(run: Path, tmp_path: Path) -> None:
    assert fetch(str(run), "merged/", tmp_path / "weights") == 2
    assert files(tmp_path / "weights").keys() == {"config.json", "sub/model.safetensors"}


@pytest.mark.parametrize(
    "there", ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"]
)
def test_a_folder_with_another_model_is_refused_and_left_as_it_is(
    there: str, run: Path, tmp_path: Path
) -> None:
    target = tmp_path / "weights"
    target.mkdir()
    (target / there).write_bytes(b"of another model")
    with pytest.raises(InputError, match="neither of this run") as raised:
        fetch(str(run), "merged", target)
    assert there in str(raised.value)
    assert "name an empty or a new folder" in str(raised.value)
    assert files(target) == {there: b"of another model"}
    assert [path.name for path in target.iterdir()] == [there]  # hidden ones too


def test_what_belongs_to_the_disk_and_hidden_files_are_nobodys_model(
    run: Path, tmp_path: Path
) -> None:
    for each in ("lost+found/x", ".gitignore", ".cache/x"):
        (tmp_path / "disk" / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / each).touch()
    assert fetch(str(run), "merged", tmp_path / "disk") == 2


def test_what_an_earlier_fetch_brought_is_replaced_and_nothing_of_it_stays(
    run: Path, tmp_path: Path
) -> None:
    target, other = tmp_path / "weights", another_run(tmp_path / "other")
    fetch(str(run), "merged", target)
    assert fetch(other, "merged", target) == 3
    assert files(target) == files(tmp_path / "other" / "merged")
    assert not (target / "sub").exists()
    fetch(str(run), "merged", target)
    assert files(target) == files(run / "merged")


def test_what_was_changed_since_it_was_fetched_is_not_lost(run: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "weights", another_run(tmp_path / "other")
    fetch(str(run), "merged", target)
    (target / "sub" / "model.safetensors").write_bytes(b"mended by hand")
    with pytest.raises(InputError, match=r"sub/model\.safetensors"):
        fetch(other, "merged", target)
    assert (target / "sub" / "model.safetensors").read_bytes() == b"mended by hand"


def test_a_fetch_that_fails_leaves_the_earlier_one_whole(run: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "weights", another_run(tmp_path / "other")
    fetch(str(run), "merged", target)
    (tmp_path / "other" / "merged" / "model-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="SHA-256 differs"):
        fetch(other, "merged", target)
    assert files(target) == files(run / "merged")


class Killed(BaseException):
    """As a kill would, at a moment of the test's choice."""


@pytest.mark.parametrize("moves", range(6))
def test_a_fetch_that_is_killed_while_files_move_is_loadable_whole_or_not_at_all_and_goes_on(
    moves: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = (run / "merged" / "config.json").read_bytes()
    target, other = tmp_path / "weights", another_run(tmp_path / "other", config=same)
    fetch(str(run), "merged", target)
    replace, left = Path.replace, iter(range(moves))

    def dies(path: Path, to: Path) -> Path:
        if ".writing-" not in path.name and next(left, None) is None:
            raise Killed
        return replace(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies)
        with suppress(Killed):
            fetch(other, "merged", target)
    found = files(target)
    if "config.json" in found:
        assert found in (files(run / "merged"), files(tmp_path / "other" / "merged"))
    fetch(other, "merged", target)
    assert files(target) == files(tmp_path / "other" / "merged")


def test_pods_that_start_together_on_one_volume_bring_it_once(run: Path, tmp_path: Path) -> None:
    """Of several processes one downloads; the others wait, and find every file whole."""
    target = tmp_path / "weights"
    code = (
        "import sys; from pathlib import Path; from job import storage; from job.cli import fetch;"
        "load = storage.download;"
        "fetch.storage.download = lambda uri, to: (print(uri), load(uri, to));"
        "fetch.fetch(sys.argv[1], 'merged', Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(run), str(target)]
    pods = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    brought = "".join(pod.communicate()[0] for pod in pods).split()
    assert [pod.returncode for pod in pods] == [0, 0, 0]
    assert len(brought) == 2
    assert files(target) == files(run / "merged")


@pytest.mark.parametrize("cut", ["in a line", "at the end"])
def test_sums_that_are_cut_are_not_taken_for_fewer_files(
    cut: str, run: Path, tmp_path: Path
) -> None:
    sums = run / "SHA256SUMS"
    text = sums.read_text()
    sums.write_text(text[: 70 if cut == "in a line" else -1])
    with pytest.raises(InputError, match="is truncated or was changed"):
        fetch(str(run), "merged", tmp_path / "weights")


def test_a_folder_that_is_a_link_to_itself_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="a symbolic link that leads back to itself"):
        fetch(str(run), "merged", tmp_path / "loop")


@pytest.mark.parametrize("place", ["merged", "merged/served", "", "checkpoints/mine"])
def test_nothing_is_fetched_into_the_output_of_a_run(place: str, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for output in (run, other):
        (output / "merged").mkdir(parents=True, exist_ok=True)
        for file in ("run.json", "spec.resolved.yaml"):
            (output / file).touch()
    (tmp_path / "link").symlink_to(other)
    before = sorted(tmp_path.rglob("*"))
    for target in (run / place, other / place, tmp_path / "link" / place):
        with pytest.raises(InputError, match=r"(?s)--to.*is inside the output of a run"):
            fetch(str(run), "merged", target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_ones_own_beside_those_of_a_run_takes_what_is_fetched(run: Path) -> None:
    for file in ("run.json", "spec.resolved.yaml"):
        (run / file).touch()
    assert fetch(str(run), "merged", run / "served" / "data") == 2

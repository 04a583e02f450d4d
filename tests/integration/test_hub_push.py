"""Pushing to a hub on loopback: one commit, private, resumable, refused early and with a reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from job import errors
from job.doctor.access import checks
from job.doctor.check import Check
from job.doctor.subject import Subject
from job.export.push import HubRepository, HubTarget, commit_title, layout
from job.pipeline import pushing
from job.spec.load import load_spec
from job.storage import retry
from tests import hub as hubs
from tests.hub import PushHub
from tests.jobs import ROOT, job, read_json, small_run, sums

FILES = {
    "README.md": b"---\nlicense: mit\n---\n# card\n",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"weights " * 100,
    "adapter/other.safetensors": b"more weights",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PushHub]:
    from huggingface_hub import constants

    with hubs.hub() as state:
        for name, value in hubs.environ(state).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
        monkeypatch.setenv(retry.RETRIES_VARIABLE, "2")
        yield state


def repository(
    name: str = "org/model", *, revision: str = "main", private: bool = True
) -> HubRepository:
    return HubRepository(HubTarget(repository=name, revision=revision, private=private))


def files(folder: Path, contents: dict[str, bytes] = FILES) -> dict[str, Path]:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: folder / name for name in contents}


def pushed(hub: PushHub, branch: str = "main") -> dict[str, bytes]:
    """What the branch holds, without what every repository has."""
    held = hub.repositories["org/model"].head(branch).files
    return {name: content for name, content in held.items() if name != ".gitattributes"}


def test_a_push_is_one_commit_to_a_private_repository_that_it_creates(
    hub: PushHub, tmp_path: Path
) -> None:
    model = repository()
    assert "will be created, private" in model.require_writable()
    assert hub.repositories == {}
    model.create()
    result = model.push(files(tmp_path), "formulas: cer 0.6 → 0.2", "by a test")
    made = hub.repositories["org/model"]
    assert made.private
    assert [commit.title for commit in made.branches["main"]] == [
        "initial commit",
        "formulas: cer 0.6 → 0.2",
    ]
    assert pushed(hub) == FILES
    assert (result.commit, result.changed, result.files) == (made.head().oid, True, len(FILES))


def test_pushing_the_same_files_again_makes_no_commit_and_sends_nothing(
    hub: PushHub, tmp_path: Path
) -> None:
    repository().create()
    first = repository().push(files(tmp_path), "title", "")
    again = repository().push(files(tmp_path), "title", "")
    assert (again.commit, again.changed) == (first.commit, False)
    assert len(hub.repositories["org/model"].branches["main"]) == 2
    assert len(hub.uploads) == 2
    other = repository().push(files(tmp_path, FILES | {"README.md": b"# new\n"}), "card", "")
    assert other.changed
    assert len(hub.uploads) == 2


def test_an_interrupted_push_sends_only_what_is_missing(hub: PushHub, tmp_path: Path) -> None:
    repository().create()
    hub.refuse_uploads_after = 1
    with pytest.raises(errors.StorageError, match="storage limit reached"):
        repository().push(files(tmp_path), "title", "")
    assert pushed(hub) == {}
    hub.refuse_uploads_after = None
    repository().push(files(tmp_path), "title", "")
    assert pushed(hub) == FILES
    assert len(hub.uploads) == len(set(hub.uploads)) == 2


@pytest.mark.parametrize("lost", [False, True])
def test_a_failed_commit_is_tried_again_and_made_once(
    hub: PushHub, tmp_path: Path, lost: bool
) -> None:
    hub.create("org/model").commit("older", {"config.json": b"{}"})
    hub.fail_first, hub.lose_first_answer = 0 if lost else 1, lost
    result = repository().push(files(tmp_path), "title", "")
    assert pushed(hub) == FILES
    assert result.changed
    assert [commit.title for commit in hub.repositories["org/model"].branches["main"]] == [
        "initial commit",
        "older",
        "title",
    ]


def test_a_branch_that_moves_meanwhile_is_an_error_and_loses_nothing(
    hub: PushHub, tmp_path: Path
) -> None:
    repository().create()
    hub.moves = True
    with pytest.raises(errors.StorageError, match="got another commit during the push"):
        repository().push(files(tmp_path), "title", "")
    assert hub.repositories["org/model"].head().title == "by somebody else"


def test_weights_of_an_earlier_push_go_and_files_of_the_user_stay(
    hub: PushHub, tmp_path: Path
) -> None:
    old = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"old", "LICENSE": b"mine"}
    old |= {"preprocessor_config.json": b"{}", "adapter/processor_config.json": b"{}"}
    hub.create("org/model").commit("older", {**old, "plots/weights.safetensors": b"mine too"})
    repository().push(files(tmp_path), "title", "")
    assert pushed(hub) == {**FILES, "LICENSE": b"mine", "plots/weights.safetensors": b"mine too"}


def test_weights_that_a_push_will_replace_are_named_before_any_work(
    hub: PushHub, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
    spec = load_spec(text, "spec", ["output.uri=hf://org/model"], {}).spec
    made = hub.create("org/model")
    made.commit("mine", {"README.md": b"mine", "plots/weights.safetensors": b"mine too"})
    made.commit("a tokenizer", {"tokenizer.model": b"mine"})
    pushing.prepare(spec)
    assert "which the push replaces" not in capsys.readouterr().err
    made.commit("more", {f"model-{n}.safetensors": b"mine" for n in range(9)})
    pushing.prepare(spec)
    said = capsys.readouterr().err
    assert "the repository holds weights, which the push replaces; its history keeps them" in said
    assert "model-0.safetensors, model-1.safetensors, model-2.safetensors …" in said


def test_a_branch_is_created_and_the_main_one_left_alone(hub: PushHub, tmp_path: Path) -> None:
    branch = repository(revision="v2/try")
    branch.create()
    branch.push(files(tmp_path), "title", "")
    assert pushed(hub, "v2/try") == FILES
    assert pushed(hub) == {}


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        ("hf_not-a-token-of-anyone", "org/model", "access denied"),
        (hubs.READER, "org/model", "HF_TOKEN may only read"),
        (hubs.READER, "org/there", "access denied"),
        (hubs.WRITER, "others/model", "does not belong to others"),
        (hubs.WRITER, "org/public", "is public"),
        ("", "org/model", "there is no token"),
    ],
)
def test_what_cannot_be_pushed_to_is_an_input_error_that_never_shows_the_token(
    hub: PushHub, monkeypatch: pytest.MonkeyPatch, token: str, name: str, said: str
) -> None:
    hub.create("org/there")
    hub.create("org/public", private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(errors.InputError, match=said) as refused:
        repository(name).require_writable()
    assert refused.value.problems[0].fix
    assert not token or token not in str(refused.value)
    assert hub.repositories.keys() == {"org/there", "org/public"}


def test_a_hub_that_is_forbidden_or_down_is_told_as_such(
    hub: PushHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(errors.InputError, match="unset HF_HUB_OFFLINE"):
        repository().require_writable()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(errors.StorageError, match="HF_ENDPOINT"):
        repository().require_writable()


def test_the_doctor_says_whether_the_export_can_be_pushed_and_creates_nothing(
    hub: PushHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
    loaded = load_spec(text, "spec", ["output.uri=hf://org/model"], {})

    def found() -> Check:
        [check] = [each for each in checks(Subject.of(loaded)) if each.name == "push"]
        return check

    assert found().state == "ok"
    assert "will be created, private" in found().found
    monkeypatch.setenv("HF_TOKEN", hubs.READER)
    assert (found().state, found().exit_code) == ("fail", errors.InputError.exit_code)
    assert hub.repositories == {}


def test_what_is_pushed_alone_stands_at_the_top() -> None:
    adapter = [("adapter/a", Path("a")), ("adapter-vllm/a", Path("b"))]
    merged = [("merged/m", Path("m"))]
    assert layout("adapter", adapter, merged).keys() == {"a", "adapter-vllm/a"}
    assert layout("merged", adapter, merged).keys() == {"m"}
    assert layout("all", adapter, merged).keys() == {"adapter/a", "adapter-vllm/a", "m"}


def test_the_commit_names_the_job_and_its_metrics() -> None:
    before, after = {"cer": 0.68, "rows": 256}, {"cer": 0.2061, "rows": 256, "bleu": 65.4}
    assert commit_title("x", before, after) == "x: cer 0.68 → 0.206, bleu 65.4"
    assert commit_title("x", {}, {}) == "x"


def test_a_token_that_may_not_write_ends_the_job_before_any_work(tmp_path: Path) -> None:
    with hubs.hub() as hub:
        done = job(
            *small_run("hf://org/model", cache=tmp_path),
            environ=hubs.environ(hub, hubs.READER),
        )
    assert done.code == errors.InputError.exit_code, done.err
    assert "HF_TOKEN may only read" in done.err
    run = read_json(tmp_path / "outputs/org--model/run.json")
    assert (run["status"], run["stages"]) == ("failed", {})


@pytest.mark.slow
def test_a_job_with_a_repository_as_its_output_pushes_what_it_keeps_and_no_token(
    tmp_path: Path,
) -> None:
    state = tmp_path / "outputs" / "org--model@tries"
    with hubs.hub() as hub:
        arguments = small_run(
            "hf://org/model@tries", "--set", "export.hub_content=all", cache=tmp_path
        )
        done = job(*arguments, environ=hubs.environ(hub))
        assert done.code == 0, done.err
        commits = hub.repositories["org/model"].branches["tries"]
        assert len(commits) == 2
        assert commits[-1].title.startswith("latex: loss ")
        kept = {
            path.removeprefix("merged/"): (state / path).read_bytes()
            for path in sums(state)
            if path.startswith(("adapter/", "merged/"))
        }
        held = {k: v for k, v in commits[-1].files.items() if k != ".gitattributes"}
        assert held == kept
        assert {"README.md", "adapter/README.md"} <= held.keys()
        push = read_json(state / "run.json")["stages"]["push"]["summary"]
        assert push["commit"] == commits[-1].oid

        asked = len(hub.asked)
        again = job(*arguments, environ=hubs.environ(hub))
        assert again.code == 0, again.err
        assert "already finished" in again.err
        assert len(hub.asked) == asked
    said = done.out + done.err + again.out + again.err
    texts = [path.read_text(errors="replace") for path in state.rglob("*") if path.is_file()]
    assert not any(hubs.WRITER in text for text in (said, *texts))

"""Storage against a hub on loopback that speaks what the client of the real one asks for."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job import errors, storage
from job.families import model_source
from job.spec.load import load_spec
from job.storage import retry
from tests.jobs import ROOT
from tests.unit.prep.test_prep import data_spec, png, run, with_source

FILES = {
    "main": {"config.json": b"{}", "weights/a.safetensors": b"main weights"},
    "v1.0": {"config.json": b'{"v": 1}', "weights/a.safetensors": b"old", "weights/b": b"x" * 70},
}
LATEX = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
TOKEN = "hf_test-token-of-this-hub"


@dataclass
class Hub:
    """What the hub does, and what it was asked."""

    endpoint: str = ""
    fail_first: int = 0
    truncate_first: int = 0
    flip_first: int = 0
    """Of the downloads of weights, so many bring another byte than is stored."""
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if self.hub.fail_first > 0:
            self.hub.fail_first -= 1
            self._answer(500, b"")
            return
        kind, path = ("models", path.removeprefix("/api/models/"))
        if path.startswith("/api/datasets/"):
            kind, path = "datasets", path.removeprefix("/api/datasets/")
        elif path.startswith("/datasets/"):
            kind, path = "datasets", path.removeprefix("/datasets/")
        repository, _, rest = path.strip("/").partition("/")
        name, _, rest = rest.partition("/")
        repository = f"{repository}/{name}"
        if repository == "org/private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "RepoNotFound")
        elif repository == "org/gated":
            self._refuse(403, "GatedRepo")
        elif repository not in ("org/model", "org/private", "org/data") or (
            (repository == "org/data") != (kind == "datasets")
        ):
            self._refuse(404, "RepoNotFound")
        else:
            self._repository(repository, rest)

    def _repository(self, repository: str, rest: str) -> None:
        action, _, rest = rest.partition("/")
        revision, _, path = rest.partition("/")
        files = FILES.get(revision or "main")
        if files is None:
            self._refuse(404, "RevisionNotFound")
        elif action in ("", "revision"):
            body = {"id": repository, "sha": "0" * 40, "siblings": [], "tags": [], "private": False}
            self._answer(200, json.dumps(body).encode())
        elif action == "tree":
            self._tree(files, path)
        elif action == "resolve" and path in files:
            content = files[path]
            if path.endswith(".safetensors") and self.command == "GET" and self.hub.flip_first > 0:
                self.hub.flip_first -= 1
                content = bytes([content[0] ^ 1]) + content[1:]
            self._content(content)
        else:
            self._refuse(404, "EntryNotFound")

    def _tree(self, files: dict[str, bytes], path: str) -> None:
        below = f"{path}/" if path else ""
        recursive = "recursive=true" in self.path.lower()
        entries: dict[str, dict[str, object]] = {}
        for name, content in files.items():
            if not name.startswith(below):
                continue
            parts = name.removeprefix(below).split("/")
            for depth in range(1, len(parts)):
                folder = below + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                size = len(content)
                entries[name] = {"type": "file", "oid": "0" * 40, "size": size, "path": name}
                if name.endswith(".safetensors"):
                    digest = hashlib.sha256(content).hexdigest()
                    entries[name]["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
        if not entries:
            self._refuse(404, "EntryNotFound")
            return
        self._answer(200, json.dumps(list(entries.values())).encode())

    def _content(self, content: bytes) -> None:
        start, end = 0, len(content)
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if asked:
            first, _, last = asked.partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"} if asked else {}
        if self.hub.truncate_first > 0 and self.command == "GET":
            self.hub.truncate_first -= 1
            self._answer(200, content[: len(content) // 2], headers)
            return
        self._answer(206 if asked else 200, content[start:end], headers)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"no: {code}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"ETag": '"etag"', "X-Repo-Commit": "0" * 40, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub()
    handler = type("Handler", (_Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        state.endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", state.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
        yield state
        server.shutdown()


def test_a_repository_is_listed_and_read(hub: Hub) -> None:
    assert storage.list_files("hf://org/model") == (
        storage.Entry("config.json", 2),
        storage.Entry("weights/a.safetensors", 12),
    )
    assert storage.list_files("hf://org/model/weights") == (storage.Entry("a.safetensors", 12),)
    assert storage.read_text("hf://org/model/config.json") == "{}"
    assert storage.read_bytes("hf://org/model/weights/a.safetensors", limit=4) == b"main"
    assert storage.size("hf://org/model/weights/a.safetensors") == 12
    assert storage.exists("hf://org/model")
    assert storage.exists("hf://org/model/weights")
    assert storage.is_file("hf://org/model/config.json")
    assert not storage.is_file("hf://org/model/weights")
    assert not storage.exists("hf://org/model/gone")
    storage.check_access("hf://org/model", "read")


def test_a_revision_is_read_where_it_is_named(hub: Hub, tmp_path: Path) -> None:
    uri = "hf://org/model@v1.0"
    assert storage.read_text(f"{uri}/config.json") == '{"v": 1}'
    entries = storage.download_tree(uri, tmp_path / "model")
    assert [entry.path for entry in entries] == [
        "config.json",
        "weights/a.safetensors",
        "weights/b",
    ]
    assert (tmp_path / "model/weights/a.safetensors").read_bytes() == b"old"
    assert storage.glob(f"{uri}/weights/*") == (
        f"{uri}/weights/a.safetensors",
        f"{uri}/weights/b",
    )


def test_datasets_are_read_by_their_own_name(hub: Hub, tmp_path: Path) -> None:
    assert storage.read_text("hf://datasets/org/data/config.json") == "{}"
    storage.copy_tree("hf://datasets/org/data", str(tmp_path / "data"))
    assert (tmp_path / "data/weights/a.safetensors").read_bytes() == b"main weights"
    assert storage.glob("hf://datasets/org/data/*.json") == ("hf://datasets/org/data/config.json",)


def test_an_open_file_can_be_read_anywhere(hub: Hub) -> None:
    with storage.open_read("hf://org/model@v1.0/weights/b") as file:
        file.seek(-4, 2)
        assert file.read() == b"xxxx"


@pytest.mark.parametrize(
    "uri",
    [
        "hf://org/gone",
        "hf://org/model@gone",
        "hf://org/model/gone.json",
        "hf://org/model@v1.0/gone/file",
        "hf://org/private/config.json",
        "hf://org/gated/config.json",
        "hf://no-namespace",
    ],
)
def test_what_is_missing_or_closed_is_an_input_error(hub: Hub, uri: str, tmp_path: Path) -> None:
    for read in (
        lambda: storage.read_bytes(uri),
        lambda: storage.download(uri, tmp_path / "file"),
        lambda: storage.download_tree(uri, tmp_path / "tree"),
        lambda: storage.check_access(uri, "read"),
    ):
        with pytest.raises(errors.InputError) as raised:
            read()
        assert uri in str(raised.value)
        assert raised.value.problems[0].fix
    assert list(tmp_path.iterdir()) == []


def test_a_private_repository_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.InputError, match="HF_TOKEN"):
        storage.list_files("hf://org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong-token-value")
    with pytest.raises(errors.InputError, match="HF_TOKEN") as raised:
        storage.list_files("hf://org/private")
    assert "hf_wrong-token-value" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert storage.list_files("hf://org/private")
    assert storage.read_text("hf://org/private/config.json") == "{}"


def test_failures_that_pass_are_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.fail_first = 2
    assert len(storage.list_files("hf://org/model")) == 2
    hub.fail_first = 1
    assert storage.read_text("hf://org/model/config.json") == "{}"
    hub.truncate_first = 1
    storage.download("hf://org/model@v1.0/weights/b", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"x" * 70


def test_a_hub_that_is_down_is_a_storage_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(retry.RETRIES_VARIABLE, "1")
    for ask in (storage.list_files, storage.exists, storage.read_bytes):
        with pytest.raises(errors.StorageError, match="HF_ENDPOINT"):
            ask("hf://org/model/config.json")


def test_rows_of_a_dataset_on_the_hub_are_read_by_split(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def table(*numbers: int) -> bytes:
        images = [{"bytes": png(50 + n), "path": f"{n}.png"} for n in numbers]
        file = io.BytesIO()
        rows = pa.table({"image": images, "text": [f"x_{n}" for n in numbers]})
        pq.write_table(rows, file, row_group_size=3)
        return file.getvalue()

    files = {
        "README.md": b"",
        "data/train-00000-of-00002.parquet": table(*range(7)),
        "data/train-00001-of-00002.parquet": table(*range(7, 12)),
        "data/test-00000-of-00001.parquet": table(99),
    }
    monkeypatch.setitem(FILES, "main", files)
    spec = replace(data_spec(Path("x")), eval_fraction=0.3)
    uri = "hf://datasets/org/data"
    data = run(with_source(spec, uri=uri, split="train"), tmp_path)
    rows = [*data.rows("train"), *data.rows("eval")]
    assert {row.answer for row in rows} == {f"x_{n}" for n in range(12)}
    assert {row.images[0].width for row in rows} == set(range(50, 62))
    with pytest.raises(errors.InputError, match="must name one of test, train"):
        run(with_source(spec, uri=uri), tmp_path)


@pytest.mark.parametrize("times", [1, 9])
def test_weights_of_other_bytes_are_fetched_again_and_never_believed(
    times: int, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_spec(LATEX, "spec", ["model.model_name_or_path=hf://org/model"], {}).spec.model
    found = model_source.find_model(model)
    hub.flip_first = times
    if times == 1:
        folder = model_source.fetch_model(found, tmp_path)
        assert (folder / "weights" / "a.safetensors").read_bytes() == b"main weights"
    else:
        with pytest.raises(
            errors.StorageError, match="the downloaded file has the wrong SHA-256, twice"
        ):
            model_source.fetch_model(found, tmp_path)
        assert not list(tmp_path.rglob("*.safetensors"))
        assert not list(tmp_path.glob("models/[!.]*"))
    assert "downloading it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "uri"),
    [
        ("HF_HUB_OFFLINE", "hf://org/model/config.json"),
        ("TRANSFORMERS_OFFLINE", "hf://org/model/config.json"),
        ("HF_HUB_OFFLINE", "hf://datasets/org/rows/train.jsonl"),
        ("HF_DATASETS_OFFLINE", "hf://datasets/org/rows/train.jsonl"),
    ],
)
@pytest.mark.parametrize("value", ["1", "yes"])
def test_the_hub_is_not_asked_if_a_variable_forbids_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str, uri: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    for ask in (storage.read_bytes, storage.list_files, storage.exists):
        with pytest.raises(errors.InputError, match=f"{variable} is set") as refused:
            ask(uri)
        assert f"unset {variable}" in str(refused.value)
        assert not isinstance(refused.value, errors.MissingInputError)
    assert hub.asked == []


def test_models_are_asked_for_if_only_datasets_are_forbidden(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert storage.exists("hf://org/nothing/config.json") is False
    assert hub.asked

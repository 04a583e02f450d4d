"""A hub on loopback that can be pushed to: what `huggingface_hub` asks for, in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_token-that-may-write-to-org", "hf_token-that-may-only-read"
LARGE = (".safetensors", ".bin")
"""Names of files that are stored by their SHA-256 (LFS); the others are part of the commit."""


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def head(self, branch: str = "main") -> Commit:
        return self.branches[branch][-1]

    def commit(self, title: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        commits = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{branch} {len(commits)} {title}".encode()).hexdigest()  # noqa: S324
        commits.append(Commit(oid, title, files))
        return commits[-1]


@dataclass
class PushHub:
    """What the hub holds, what it was asked, and what it refuses."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256."""
    uploads: list[str] = field(default_factory=list)
    """The objects that were sent."""
    asked: list[str] = field(default_factory=list)
    refuse_uploads_after: int | None = None
    """After so many objects, further ones are refused with 403, as if the quota were full."""
    fail_first: int = 0
    """Of the commits, so many are answered with 500."""
    lose_first_answer: bool = False
    """The first commit is made, but answered with 500."""
    moves: bool = False
    """Whether somebody else commits right before each commit."""
    storing: threading.Lock = field(default_factory=threading.Lock)
    """Of two objects that arrive at once, the second is the second."""

    def create(self, name: str, *, private: bool = True) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit("initial commit", {".gitattributes": b""})
        return repository


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: PushHub

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if path == "/":
            self._answer(200, {})
        elif path.startswith("/lfs/"):
            self._store(path.removeprefix("/lfs/"))
        elif self._token() not in (WRITER, READER):
            self._refuse(401, "invalid token")
        elif path == "/api/whoami-v2":
            role = "write" if self._token() == WRITER else "read"
            auth = {"accessToken": {"role": role}}
            self._answer(200, {"name": "someone", "orgs": [{"name": "org"}], "auth": auth})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create()
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch()
        else:
            name, action, rest = self._parsed(path)
            if name not in self.hub.repositories:
                self._refuse(404, "no such repository", "RepoNotFound")
            else:
                self._repository(self.hub.repositories[name], name, action, rest)

    def _repository(self, repository: Repository, name: str, action: str, rest: str) -> None:
        if action == "branch":
            known = rest in repository.branches
            repository.branches.setdefault(rest, [*repository.branches["main"]])
            self._answer(409 if known else 201, {})
        elif action == "auth-check":
            self._answer(200, {}) if self._token() == WRITER else self._refuse(403, "read only")
        elif (rest or "main") not in repository.branches:
            self._refuse(404, "no such revision", "RevisionNotFound")
        elif action in ("", "revision"):
            head = repository.head(rest or "main")
            body = {"id": name, "sha": head.oid, "siblings": [], "private": repository.private}
            self._answer(200, {**body, "tags": []})
        elif action == "tree":
            self._answer(200, [_entry(*each) for each in repository.head(rest).files.items()])
        elif action == "preupload":
            self._preupload(repository.head(rest))
        else:
            self._commit(repository, name, rest)

    def _create(self) -> None:
        asked = json.loads(self._body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name'].rpartition('/')[2]}"
        if self._token() != WRITER:
            self._refuse(403, "read only")
        elif name in self.hub.repositories:
            self._answer(409, {"error": "exists", "url": f"{self.hub.endpoint}/{name}"})
        else:
            self.hub.create(name, private=asked.get("visibility") == "private")
            self._answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _preupload(self, head: Commit) -> None:
        files = []
        for file in json.loads(self._body)["files"]:
            large, content = file["path"].endswith(LARGE), head.files.get(file["path"])
            mode = "lfs" if large else "regular"
            oid = None if content is None else _oid(content, large=large)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                         | ({"oid": oid} if oid else {}))  # fmt: skip
        self._answer(200, {"files": files})

    def _batch(self) -> None:
        objects = []
        for each in json.loads(self._body)["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/lfs/{each['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        assert hashlib.sha256(self._body).hexdigest() == oid
        with self.hub.storing:
            limit = self.hub.refuse_uploads_after
            full = limit is not None and len(self.hub.uploads) >= limit
            if not full:
                self.hub.objects[oid] = self._body
                self.hub.uploads.append(oid)
        if full:
            self._refuse(403, "private repository storage limit reached")
        else:
            self._answer(200, {})

    def _commit(self, repository: Repository, name: str, branch: str) -> None:
        if self.hub.fail_first > 0:
            self.hub.fail_first -= 1
            self._refuse(500, "try again")
            return
        lines = [json.loads(line) for line in self._body.splitlines() if line]
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        if self.hub.moves:
            repository.commit("by somebody else", repository.head(branch).files, branch)
        if header.get("parentCommit") not in (None, repository.head(branch).oid):
            self._refuse(412, "A commit has happened since. Please refresh and try again.")
            return
        files = dict(repository.head(branch).files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(header["summary"], files, branch)
        if self.hub.lose_first_answer:
            self.hub.lose_first_answer = False
            self._refuse(500, "the answer was lost")
            return
        url = f"{self.hub.endpoint}/{name}/commit/{commit.oid}"
        self._answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url})

    def _parsed(self, path: str) -> tuple[str, str, str]:
        """The repository, the action, and its revision."""
        owner, _, rest = path.removeprefix("/api/models/").partition("/")
        name, _, rest = rest.partition("/")
        action, _, rest = rest.partition("/")
        return f"{owner}/{name}", action, rest

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._answer(status, {"error": message}, headers)

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def _oid(content: bytes, *, large: bool) -> str:
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's


def _entry(path: str, content: bytes) -> dict[str, object]:
    large = path.endswith(LARGE)
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = _oid(content, large=False)
    if large:
        oid = _oid(content, large=True)
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def hub() -> Iterator[PushHub]:
    """A hub with no repositories, on which `someone` of `org` has the token WRITER."""
    state = PushHub()
    handler = type("Handler", (_Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        state.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield state
        server.shutdown()


def environ(state: PushHub, token: str = WRITER) -> dict[str, str]:
    """The environment in which a job uses the hub; uploads go by LFS, which it speaks."""
    return {"HF_ENDPOINT": state.endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}

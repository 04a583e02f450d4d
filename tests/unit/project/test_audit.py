"""The audit of the locks finds what is planted, and does not take silence for a clean answer."""

import json
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import ROOT, Finished
from tests.s3 import free_ports

CLEAN, FOUND, UNANSWERED = 0, 1, 3
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@dataclass
class Service:
    """Answers as OSV does: `known` maps a package and version to vulnerabilities."""

    url: str = ""
    known: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture
def service() -> Iterator[Service]:
    found = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            pin = (query["package"]["name"], query["version"])
            found.asked.append(pin)
            body = json.dumps({"vulns": found.known.get(pin, [])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found.url = f"http://127.0.0.1:{server.server_port}/v1/query"
        yield found
        server.shutdown()


def audit(locks: Path, url: str, *more: str) -> Finished:
    command = [sys.executable, "requirements/audit.py", "--locks", str(locks), "--service", url]
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
    return Finished(done.returncode, done.stdout, done.stderr)


def lock(folder: Path, *lines: str) -> Path:
    (folder / "base.txt").write_text("# made\n" + "".join(f"{line}\n" for line in lines))
    return folder


def test_the_locks_pass_with_every_pin_asked_about(service: Service) -> None:
    done = audit(ROOT / "requirements", service.url)
    assert done.code == CLEAN, done.out
    lines = {line for path in LOCKS for line in path.read_text().splitlines() if "==" in line}
    asked = {f"{name}=={version}" for name, version in service.asked}
    assert asked == {line.replace("===", "==") for line in lines}


NO_PINS = (
    *("pillow", "pillow>=13", "pillow~=13.0", "pillow==13.*", "Pillow==13.0.0 --hash=sha256:0"),
    *("-e .", "-r other.txt", "pillow @ https://host/pillow.whl", "git+https://host/pillow"),
    "--extra-index-url https://host/simple",
)


def test_a_line_that_is_no_exact_pin_is_found(service: Service, tmp_path: Path) -> None:
    done = audit(lock(tmp_path, "idna==3.20", *NO_PINS), service.url)
    assert done.code == FOUND
    assert service.asked == [("idna", "3.20")]
    for number, line in enumerate(NO_PINS, 3):
        assert f"base.txt:{number}: {line}: is no exact pin" in done.out


def test_a_vulnerable_version_is_found_without_the_service(
    service: Service, tmp_path: Path
) -> None:
    done = audit(lock(tmp_path, "pillow==9.5.0", "torch===2.5.1", "idna==3.20"), service.url)
    assert done.code == FOUND
    assert "base.txt: pillow 9.5.0: CVE-2023-50447" in done.out
    assert "base.txt: torch 2.5.1: CVE-2025-32434" in done.out
    assert "idna" not in done.out


def test_what_the_service_knows_is_found(service: Service, tmp_path: Path) -> None:
    fixed = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "13.0.1"}]}
    about = {"package": {"ecosystem": "PyPI", "name": "pillow"}, "ranges": [fixed]}
    vulnerability = {
        "id": "GHSA-planted", "summary": "planted", "details": "", "aliases": ["CVE-2999-1"],
        "modified": "2999-01-01T00:00:00Z", "affected": [about],
    }  # fmt: skip
    service.known["pillow", "13.0.0"] = [vulnerability]
    done = audit(lock(tmp_path, "idna==3.20", "pillow==13.0.0"), service.url)
    assert done.code == FOUND, done.err
    assert "pillow 13.0.0: CVE-2999-1" in done.out.replace("GHSA-planted", "CVE-2999-1")
    assert "fixed in: 13.0.1" in done.out


def test_no_answer_is_no_finding_and_not_taken_for_a_clean_one(tmp_path: Path) -> None:
    [port] = free_ports(1)
    done = audit(lock(tmp_path, "idna==3.20"), f"http://127.0.0.1:{port}/v1/query")
    assert done.code == UNANSWERED
    assert "UNKNOWN  the service gave no answer" in done.err
    assert "FOUND" not in done.out


def test_a_finding_counts_where_the_service_gives_no_answer_too(tmp_path: Path) -> None:
    [port] = free_ports(1)
    done = audit(lock(tmp_path, "pillow==9.5.0"), f"http://127.0.0.1:{port}/v1/query")
    assert done.code == FOUND
    assert "UNKNOWN" in done.err


def test_a_licence_that_is_not_allowed_is_found(service: Service, tmp_path: Path) -> None:
    about = tmp_path / "site" / "idna-3.20.dist-info"
    about.mkdir(parents=True)
    site = ("--site", str(tmp_path / "site"))
    for stated, code in (("AGPL-3.0-only", FOUND), ("MIT", CLEAN)):
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: idna\nVersion: 3.20\nLicense-Expression: {stated}\n"
        )
        done = audit(lock(tmp_path, "idna==3.20"), service.url, *site)
        assert done.code == code, stated
        assert (f"idna 3.20: its licence is not allowed: {stated}" in done.out) == (code == FOUND)


@pytest.mark.parametrize(
    ("stated", "fine"),
    [
        *(("MIT", True), ("MIT AND Zlib", True), ("MIT OR GPL-3.0", True), ("GPL-3.0", False)),
        *(("MIT AND GPL-3.0 OR Zlib", True), ("MIT AND GPL-3.0", False), (None, False)),
        *(("MIT WITH LLVM-exception", True), ("GPL-3.0 WITH Classpath", False), ("", False)),
    ],
)
def test_of_an_expression_one_of_or_and_all_of_and_count(stated: str | None, fine: bool) -> None:
    allowed = runpy.run_path(str(ROOT / "requirements" / "audit.py"))["allowed"]
    assert allowed(stated, ["MIT", "Zlib"]) is fine

"""S3 is reached through the proxy that `manifest --proxy` names, except hosts of `--no-proxy`."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.conftest import S3


class Proxy(ThreadingHTTPServer):
    """Forwards requests and keeps their hosts."""

    daemon_threads = True

    def __init__(self) -> None:
        self.hosts: list[str] = []
        super().__init__(("127.0.0.1", 0), _Forward)


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # which answers `Expect: 100-continue`
    server: Proxy

    def _forward(self) -> None:
        url = urlsplit(self.path)
        self.server.hosts.append(url.netloc)
        own = ("expect", "transfer-encoding", "connection", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
        connection = HTTPConnection(url.netloc, timeout=30)
        target = f"{url.path}?{url.query}" if url.query else url.path
        connection.request(self.command, target, self._body(), headers)
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("direct", [False, True])
def test_s3_is_reached_through_the_proxy_unless_it_is_excepted(
    s3: S3, proxy: Proxy, direct: bool
) -> None:
    address = f"http://127.0.0.1:{proxy.server_address[1]}"
    environ = {
        **os.environ,
        "HTTP_PROXY": address,
        "HTTPS_PROXY": address,
        "NO_PROXY": "localhost,.svc" + (",127.0.0.1" if direct else ""),
    }
    code = (
        f"from job import storage; storage.write_text('s3://{s3.bucket}/x', 'here');"
        f"print(storage.read_text('s3://{s3.bucket}/x'))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.stdout == "here\n", done.stderr
    assert set(proxy.hosts) == (set() if direct else {urlsplit(s3.server.endpoint).netloc})

"""A proxy between a client and an S3 server that does what networks and stores do at bad times."""

import http.client
import itertools
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal["answer", "reset", "stall", "truncate", "flip"]


@dataclass(kw_only=True)
class Fault:
    """What happens to some of the requests."""

    kind: Kind
    matching: str = ""
    """A pattern in `METHOD /bucket/key?query`."""
    key: str = ""
    """Of the access key that signed."""
    first: int = 0
    """How many matching requests pass before."""
    every: int = 1
    """Then each of so many is hit."""
    times: int = 10**9
    """At most so many."""
    status: int = 500
    code: str = "InternalError"
    checksums: bool = True
    """Whether the answer still has the store's checksum, which not every store gives."""
    seconds: float = 5.0
    """Of a stall."""
    then: Callable[[], None] | None = None
    """Called after each hit."""
    hits: int = 0
    _seen: "itertools.count[int]" = field(default_factory=itertools.count)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def applies(self, request: str, authorization: str) -> bool:
        if not re.search(self.matching, request) or self.key not in authorization:
            return False
        with self._counting:
            seen = next(self._seen) - self.first
            if seen < 0 or seen % self.every or self.hits >= self.times:
                return False
            self.hits += 1
        return True


class Proxy:
    """Passes requests on to `endpoint`, but for `faults`; use it in a `with`."""

    def __init__(self, endpoint: str, *faults: Fault) -> None:
        self.faults = list(faults)
        self.requests: list[str] = []
        target = endpoint.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = f"{self.command} {self.path}"
                authorization = self.headers.get("Authorization", "")
                proxy.requests.append(request)
                fault = next((f for f in proxy.faults if f.applies(request, authorization)), None)
                if fault is not None and fault.kind in ("answer", "reset", "stall"):
                    self._refuse(fault)
                else:
                    self._pass_on(body, target, fault)
                if fault is not None and fault.then is not None:
                    fault.then()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def _refuse(self, fault: Fault) -> None:
                if fault.kind == "reset":
                    linger = struct.pack("ii", 1, 0)  # closing then sends a reset
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()
                    self.close_connection = True
                    return
                if fault.kind == "stall":
                    time.sleep(fault.seconds)
                    self.close_connection = True
                    return
                text = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
                body = b"" if self.command == "HEAD" else text.encode()
                self.send_response(fault.status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _pass_on(self, body: bytes, target: str, fault: Fault | None) -> None:
                if fault is not None and fault.kind == "flip" and self.command == "PUT":
                    body = _flipped(body)
                connection = http.client.HTTPConnection(target, timeout=60)
                connection.putrequest(
                    self.command, self.path, skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        connection.putheader(name, value)
                connection.endheaders(body)
                answer = connection.getresponse()
                data = answer.read()
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if fault is not None and not fault.checksums and "checksum" in name.lower():
                        continue
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(length or 0))
                self.end_headers()
                if fault is not None and fault.kind == "flip" and self.command == "GET":
                    data = _flipped(data)
                if fault is not None and fault.kind == "truncate":
                    data = data[: len(data) // 2]
                    self.close_connection = True
                self.wfile.write(data)
                connection.close()

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # clients that gave up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data

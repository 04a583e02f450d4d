"""Storage against a real S3 server, and against one that fails on the way to it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

from job import errors, storage
from job.storage import retry
from job.storage.backends import s3_writes
from tests.conftest import S3
from tests.s3 import READER

MIB = 2**20
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>wait</Message></Error>"
SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_SLOW_DOWN), _SLOW_DOWN)
)


class Proxy:
    """Passes bytes on to the server: as it is, after failures, slowly, or no further."""

    def __init__(self, port: int) -> None:
        self.refuse_first = 0
        """Requests to answer with 503 before any is passed on."""
        self.refuse_with: bytes | None = None
        """Words in a request that is always answered with 503."""
        self.lose_answer_to: bytes | None = None
        """Words in a request that is passed on once, and whose answer is not."""
        self.stall_after: int | None = None
        """Bytes from clients after which nothing is passed on any more."""
        self.bytes_per_second: float = float("inf")
        self.passed = self.refused = 0
        self._port = port
        self._open = True
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._open = False
        self._socket.close()

    def _accept(self) -> None:
        while self._open:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            mute = threading.Event()
            threading.Thread(target=self._answer, args=(server, client, mute), daemon=True).start()
            while data := self._receive(client):
                if self._refuses(data):
                    client.sendall(SLOW_DOWN)
                    # Closing on an unread body would reset the connection before the answer.
                    client.shutdown(socket.SHUT_WR)
                    while self._receive(client):
                        pass
                    return
                with self._lock:
                    self.passed += len(data)
                while self._open and self.passed > (self.stall_after or float("inf")):
                    time.sleep(0.02)
                if not self._open:
                    return
                time.sleep(len(data) / self.bytes_per_second)
                if self.lose_answer_to and self.lose_answer_to in data[:2000]:
                    self.lose_answer_to = None
                    mute.set()
                server.sendall(data)

    def _refuses(self, data: bytes) -> bool:
        with self._lock:
            if self.refuse_first > 0:
                self.refuse_first -= 1
                self.refused += 1
                return True
        if self.refuse_with and self.refuse_with in data[:2000]:
            self.refused += 1
            return True
        return False

    def _answer(self, server: socket.socket, client: socket.socket, mute: threading.Event) -> None:
        while data := self._receive(server):
            try:
                if mute.is_set():
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
            except OSError:
                return

    @staticmethod
    def _receive(source: socket.socket) -> bytes:
        try:
            return source.recv(MIB)
        except OSError:
            return b""


@pytest.fixture
def proxy(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A way to the server that can fail; from here on storage takes it."""
    between = Proxy(s3.server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.02)
    yield between
    between.close()


def client(s3: S3) -> Any:
    return boto3.client("s3", endpoint_url=s3.server.endpoint)


def keys(s3: S3) -> list[str]:
    found = client(s3).list_objects_v2(Bucket=s3.bucket)
    return [each["Key"] for each in found.get("Contents", [])]


def unfinished_uploads(s3: S3) -> list[object]:
    found: dict[str, list[object]] = client(s3).list_multipart_uploads(Bucket=s3.bucket)
    return found.get("Uploads", [])


# What is there -----------------------------------------------------------------------------


def test_what_is_written_is_read_listed_and_deleted(s3: S3, tmp_path: Path) -> None:
    one, two = s3.uri("a/one.txt"), s3.uri("a/b/two.bin")
    assert storage.list_files(s3.uri("a")) == ()
    assert not storage.exists(s3.uri("a"))
    storage.write_text(one, "grüße")
    storage.write_bytes(two, b"0123456789")
    storage.write_bytes(s3.uri("a/empty"), b"")

    assert storage.read_text(one) == "grüße"
    assert storage.read_bytes(two, limit=4) == b"0123"
    assert storage.read_bytes(s3.uri("a/empty"), limit=4) == b""
    assert storage.size(two) == 10
    assert storage.list_files(s3.uri("a")) == (
        storage.Entry("b/two.bin", 10),
        storage.Entry("empty", 0),
        storage.Entry("one.txt", 7),
    ), "a new object shows in a listing made before"
    assert storage.glob(s3.uri("a/*.txt")) == (one,)
    assert storage.glob(s3.uri("**/*.bin")) == (two,)
    assert storage.exists(s3.uri("a"))
    assert storage.exists(s3.uri())
    assert storage.is_file(one)
    assert not storage.is_file(s3.uri("a"))

    storage.write_text(one, "new")
    storage.download(one, tmp_path / "deep/one.txt")
    assert (tmp_path / "deep/one.txt").read_text() == "new"
    storage.delete(one)
    storage.delete(one)
    assert not storage.exists(one)


def test_a_prefix_is_deleted_without_its_namesakes(s3: S3) -> None:
    for path in ("run/step-1/a", "run/step-1/b/c", "run/step-10/a", "run/step-1.txt"):
        storage.write_text(s3.uri(path), "x")
    storage.delete_tree(s3.uri("run/step-1"))
    storage.delete_tree(s3.uri("run/step-1"))
    assert keys(s3) == ["run/step-1.txt", "run/step-10/a"]


def test_a_listing_goes_on_past_the_first_page(s3: S3) -> None:
    put = client(s3).put_object
    with ThreadPoolExecutor(8) as pool:
        for index in range(1020):
            pool.submit(put, Bucket=s3.bucket, Key=f"many/{index:04d}", Body=b"")
    assert len(storage.list_files(s3.uri("many"))) == 1020


def test_markers_of_directories_are_not_files(s3: S3, tmp_path: Path) -> None:
    client(s3).put_object(Bucket=s3.bucket, Key="tree/", Body=b"")
    client(s3).put_object(Bucket=s3.bucket, Key="tree/sub/", Body=b"")
    client(s3).put_object(Bucket=s3.bucket, Key="tree/sub/file", Body=b"x")
    assert storage.download_tree(s3.uri("tree"), tmp_path) == (storage.Entry("sub/file", 1),)


class HostileListing(BaseHTTPRequestHandler):
    """A store that lists a name which the real server would not take."""

    name = ""

    def do_GET(self) -> None:
        key = f"tree/{self.name}"
        body = (
            "<ListBucketResult><Name>b</Name><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated>"
            f"<Contents><Key>{key}</Key><Size>4</Size></Contents></ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a//b", "a\\b", "./a"])
def test_names_that_could_leave_the_directory_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(HostileListing, "name", name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any-secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), HostileListing) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(errors.InputError, match="could escape the directory") as raised:
            storage.download_tree("s3://bucket/tree", tmp_path / "target")
        server.shutdown()
    assert repr(name) in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_open_object_serves_parquet(s3: S3) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"row {index}" for index in range(1000)]})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    storage.write_bytes(s3.uri("rows.parquet"), buffer.getvalue().to_pybytes())
    with storage.open_read(s3.uri("rows.parquet")) as file:
        assert pq.read_table(file).num_rows == 1000
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1"


def test_trees_go_up_across_and_down(s3: S3, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for index in range(12):
        path = source / f"{index % 3}/{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(index))
    (source / "_SUCCESS").touch()
    stored = storage.upload_tree(source, s3.uri("x"), last=("_SUCCESS",))
    assert storage.copy_tree(s3.uri("x"), s3.uri("y")) == stored
    memory = f"memory://{s3.bucket}"
    assert storage.copy_tree(s3.uri("y"), memory) == stored
    assert storage.copy_tree(memory, s3.uri("z")) == stored
    assert storage.download_tree(s3.uri("z"), tmp_path / "target") == stored
    assert (tmp_path / "target/2/11.txt").read_text() == "11"
    storage.delete_tree(memory)


def test_an_endpoint_may_have_a_host_name(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{s3.server.port}")
    storage.write_text(s3.uri("file"), "x")
    assert storage.read_text(s3.uri("file")) == "x"


# Large objects -----------------------------------------------------------------------------


def test_a_large_file_goes_up_in_parts_and_comes_back_the_same(s3: S3, tmp_path: Path) -> None:
    data = os.urandom(2 * s3_writes.PART + 5)
    (tmp_path / "large").write_bytes(data)
    storage.upload(tmp_path / "large", s3.uri("file"))
    storage.write_bytes(s3.uri("bytes"), data)
    for name in ("file", "bytes"):
        tag = client(s3).head_object(Bucket=s3.bucket, Key=name)["ETag"]
        assert tag.strip('"').endswith("-3"), "three parts"
    storage.download(s3.uri("file"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert storage.read_bytes(s3.uri("bytes")) == data
    assert unfinished_uploads(s3) == []


def test_a_failed_upload_is_aborted(s3: S3, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_writes, "PART", 5 * MIB)
    monkeypatch.setenv(retry.RETRIES_VARIABLE, "1")
    proxy.refuse_with = b"partNumber=2"
    with pytest.raises(errors.StorageError, match="after 2 attempts"):
        storage.write_bytes(s3.uri("large"), bytes(12 * MIB))
    assert proxy.refused == 2
    assert keys(s3) == []
    assert unfinished_uploads(s3) == []


def test_only_the_failed_part_is_sent_again(
    s3: S3, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_writes, "PART", 5 * MIB)
    data = os.urandom(12 * MIB)
    proxy.refuse_with = b"partNumber=2"
    threading.Thread(target=_after, args=(lambda: proxy.refused > 0, proxy)).start()
    storage.write_bytes(s3.uri("large"), data)
    assert storage.read_bytes(s3.uri("large")) == data
    assert proxy.passed < 12 * MIB + 6 * MIB


def test_a_completed_upload_whose_answer_was_lost_counts(
    s3: S3, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(s3_writes, "PART", 5 * MIB)
    proxy.lose_answer_to = f"POST /{s3.bucket}/large?uploadId=".encode()
    storage.write_bytes(s3.uri("large"), bytes(12 * MIB))
    assert "ConnectionClosedError" in capsys.readouterr().err
    assert storage.size(s3.uri("large")) == 12 * MIB
    assert unfinished_uploads(s3) == []


def _after(true: Callable[[], bool], proxy: Proxy) -> None:
    _wait_until(true)
    proxy.refuse_with = None


def test_an_upload_that_a_signal_ends_is_aborted(
    s3: S3, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_writes, "PART", 5 * MIB)
    proxy.bytes_per_second = 4 * MIB

    def stop(*_: object) -> None:
        raise errors.Stopped("SIGALRM", "stop")

    def signal_under_way() -> None:
        _wait_until(lambda: proxy.passed > 6 * MIB)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        threading.Thread(target=signal_under_way).start()
        with pytest.raises(errors.Stopped):
            storage.write_bytes(s3.uri("large"), bytes(200 * MIB))
    finally:
        signal.signal(signal.SIGALRM, before)
    # The parts that were under way end; on a busy machine more have begun before the signal.
    assert proxy.passed < 100 * MIB
    assert keys(s3) == []
    assert unfinished_uploads(s3) == []


@pytest.mark.parametrize("size", [12, 40], ids=["single put", "multipart"])
def test_a_killed_writer_leaves_nothing_visible(
    size: int, s3: S3, proxy: Proxy, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(bytes(size * MIB))
    proxy.stall_after = 6 * MIB
    code = (
        "import sys; from pathlib import Path; from job import storage\n"
        "storage.upload(Path(sys.argv[1]), sys.argv[2])"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, tmp_path / "large", s3.uri("large")])
    try:
        _wait_until(lambda: proxy.passed > 6 * MIB)
    finally:
        writer.kill()
        writer.wait()
    proxy.close()
    os.environ["AWS_ENDPOINT_URL"] = s3.server.endpoint  # the fixture restores it
    assert not storage.exists(s3.uri("large"))
    assert storage.list_files(s3.uri()) == ()


# What users must fix  ----------------------------------------------------------------------


def test_a_missing_object_or_bucket_is_an_input_error(s3: S3, tmp_path: Path) -> None:
    for uri in (s3.uri("gone"), f"s3://{s3.bucket}-gone/key"):
        for read in (storage.read_bytes, storage.size, storage.open_read):
            with pytest.raises(errors.InputError, match="not found") as raised:
                read(uri)
            assert uri in str(raised.value)
            assert "AWS_ENDPOINT_URL" in str(raised.value)
        with pytest.raises(errors.InputError, match="not found"):
            storage.download(uri, tmp_path / "file")
        with pytest.raises(errors.InputError, match="not found"):
            storage.download_tree(uri, tmp_path / "tree")
        with pytest.raises(errors.InputError, match="not found"):
            storage.check_access(uri, "read")
        assert not storage.exists(uri)
    with pytest.raises(errors.InputError, match="NoSuchBucket"):
        storage.list_files(f"s3://{s3.bucket}-gone/prefix")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["s3://No_Such_Name!/key", "s3:///key", "s3://"])
def test_a_bucket_name_that_cannot_be_is_an_input_error(s3: S3, uri: str) -> None:
    with pytest.raises(errors.InputError):
        storage.read_bytes(uri)
    with pytest.raises(errors.InputError):
        storage.write_bytes(uri, b"x")


def test_wrong_keys_are_an_input_error_without_the_secret(
    s3: S3, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.write_text(s3.uri("file"), "x")
    for name, value in (
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-value"),
        ("AWS_ACCESS_KEY_ID", "wrong-access-key"),
    ):
        monkeypatch.setenv(name, value)
        for ask in (
            lambda: storage.read_bytes(s3.uri("file")),
            lambda: storage.exists(s3.uri("file")),
            lambda: storage.list_files(s3.uri()),
            lambda: storage.glob(s3.uri("*")),
            lambda: storage.write_text(s3.uri("file"), "y"),
            lambda: storage.delete(s3.uri("file")),
            lambda: storage.check_access(s3.uri("out"), "write"),
        ):
            with pytest.raises(errors.InputError, match="access denied") as raised:
                ask()
            assert s3.bucket in str(raised.value)
            assert "AWS_SECRET_ACCESS_KEY" in (raised.value.problems[0].fix or "")
            assert value not in str(raised.value)
    assert capsys.readouterr().err == "", "nobody retries a wrong key"


def test_missing_keys_are_an_input_error(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(errors.InputError, match="Unable to locate credentials"):
        storage.read_bytes(s3.uri("file"))


def test_keys_that_may_only_read_fail_the_early_check(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_text(s3.uri("in/file"), "x")
    for name, value in s3.server.environ_of(READER).items():
        monkeypatch.setenv(name, value)
    storage.check_access(s3.uri("in"), "read")
    storage.check_access(s3.uri("in/*"), "read")
    with pytest.raises(errors.InputError, match="cannot write: access denied") as raised:
        storage.check_access(s3.uri("out"), "write")
    assert raised.value.problems[0].field == s3.uri("out")


def test_the_early_check_leaves_nothing(s3: S3) -> None:
    storage.check_access(s3.uri("out"), "write")
    assert keys(s3) == []


# What may pass -----------------------------------------------------------------------------


def test_failures_that_pass_are_tried_again_and_told(
    s3: S3, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count, work in enumerate(
        (
            lambda: storage.write_text(s3.uri("file"), "x"),
            lambda: storage.read_text(s3.uri("file")),
            lambda: storage.exists(s3.uri("file")),
            lambda: storage.list_files(s3.uri()),
            lambda: storage.glob(s3.uri("*")),
            lambda: storage.download(s3.uri("file"), tmp_path / "file"),
            lambda: storage.open_read(s3.uri("file")).read(),
            lambda: storage.copy_tree(s3.uri(), s3.uri("copy")),
            lambda: storage.delete(s3.uri("file")),
        ),
        start=1,
    ):
        proxy.refuse_first = 2
        assert work() is not False, count
        told = [line for line in capsys.readouterr().err.splitlines() if "attempt" in line]
        assert len(told) == 2, (count, told)
        assert s3.bucket in told[0]
    assert proxy.refused == 18


def test_a_server_that_is_down_is_a_storage_error_within_bounds(
    s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(retry.RETRIES_VARIABLE, "1")
    (tmp_path / "file").touch()
    for ask in (
        lambda: storage.read_bytes(s3.uri("file")),
        lambda: storage.exists(s3.uri("file")),
        lambda: storage.upload_tree(tmp_path, s3.uri()),
        lambda: storage.check_access(s3.uri("out"), "write"),
    ):
        with pytest.raises(errors.StorageError, match="after 2 attempts") as raised:
            ask()
        assert s3.bucket in str(raised.value)
        assert "http://127.0.0.1:9" in str(raised.value)


def _wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)

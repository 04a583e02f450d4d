"""Storage without a server: URIs, local files, memory, plain HTTP, and what failures become."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from job import errors, storage
from job.storage import failures, local, retry
from job.storage.uri import INCOMPLETE_PREFIX

# URIs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("s3://bucket", ("a", "b/c"), "s3://bucket/a/b/c"),
        ("s3://bucket/a/", ("/b/",), "s3://bucket/a/b"),
        ("memory://", ("a",), "memory://a"),
        ("/", ("a",), "/a"),
        ("out", ("a", "", "b"), "out/a/b"),
        ("file:///", ("a",), "file:///a"),
        ("hf://org/repo@main", ("a.json",), "hf://org/repo@main/a.json"),
        ("/a/b/", (), "/a/b/"),
    ],
)
def test_join_puts_single_slashes_between_parts(
    uri: str, parts: tuple[str, ...], expected: str
) -> None:
    assert storage.join(uri, *parts) == expected


@pytest.mark.parametrize(
    ("uri", "name", "parent"),
    [
        ("s3://bucket/a/b.txt", "b.txt", "s3://bucket/a"),
        ("s3://bucket/a/", "a", "s3://bucket"),
        ("s3://bucket", "bucket", "s3://bucket"),
        ("/a/b", "b", "/a"),
        ("a", "a", "."),
        ("file:///a", "a", "file:///"),
        ("https://host/a/b.txt?v=1#x", "b.txt", "https://host/a"),
    ],
)
def test_name_and_parent_split_a_uri(uri: str, name: str, parent: str) -> None:
    assert storage.name(uri) == name
    assert storage.parent(uri) == parent


def test_only_bare_paths_and_file_uris_are_local() -> None:
    assert storage.is_local("a/b")
    assert storage.is_local("file:///a/b")
    assert not storage.is_local("memory://a")
    assert storage.local_path("file:///a/b") == Path("/a/b")
    assert storage.local_path("~/x") == Path.home() / "x"


def test_a_question_mark_is_a_pattern_except_in_a_url() -> None:
    assert storage.has_glob("s3://bucket/part-?.parquet")
    assert storage.has_glob("data/*.jsonl")
    assert not storage.has_glob("https://host/file?download=true")
    assert not storage.has_glob("s3://bucket/data.jsonl")


def test_importing_storage_loads_no_client() -> None:
    code = (
        "import sys, job.storage;"
        "print(sorted({'fsspec', 's3fs', 'botocore', 'huggingface_hub', 'tenacity'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


# Round trips -------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[str]:
    root = f"memory://test-{os.urandom(4).hex()}"
    yield root
    storage.delete_tree(root)


@pytest.fixture(params=["bare", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return {
        "bare": str(tmp_path / "root"),
        "file": f"file://{tmp_path}/root",
        "memory": memory,
    }[request.param]


def test_what_is_written_is_read_listed_and_deleted(root: str) -> None:
    one, two = storage.join(root, "a/one.txt"), storage.join(root, "a/b/two.bin")
    storage.write_text(one, "grüße")
    storage.write_bytes(two, b"0123456789")
    storage.write_bytes(storage.join(root, "empty"), b"")

    assert storage.read_text(one) == "grüße"
    assert storage.read_bytes(two) == b"0123456789"
    assert storage.read_bytes(two, limit=4) == b"0123"
    assert storage.read_bytes(storage.join(root, "empty"), limit=4) == b""
    assert storage.size(two) == 10
    assert storage.list_files(root) == (
        storage.Entry("a/b/two.bin", 10),
        storage.Entry("a/one.txt", 7),
        storage.Entry("empty", 0),
    )
    assert storage.glob(storage.join(root, "**/*.bin")) == (two,)
    assert storage.exists(one)
    assert storage.exists(storage.join(root, "a"))
    assert storage.is_file(one)
    assert not storage.is_file(storage.join(root, "a"))

    storage.write_bytes(two, b"new")
    assert storage.read_bytes(two) == b"new"
    storage.delete(two)
    storage.delete(two)
    assert not storage.exists(two)
    storage.delete_tree(root)
    storage.delete_tree(root)
    assert not storage.exists(root)
    assert storage.list_files(root) == ()


def test_an_open_file_can_be_read_anywhere(root: str) -> None:
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"0123456789")
    with storage.open_read(uri) as file, storage.open_read(uri) as other:
        file.seek(-3, os.SEEK_END)
        assert other.read(2) == b"01"
        assert file.read() == b"789"
        file.seek(2)
        assert file.read(3) == b"234"
        assert file.tell() == 5


def test_trees_are_uploaded_downloaded_and_copied(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "deep/b.txt").write_text("bb")

    stored = storage.upload_tree(source, storage.join(root, "x"))
    assert stored == (storage.Entry("a.txt", 1), storage.Entry("deep/b.txt", 2))
    storage.copy_tree(storage.join(root, "x"), storage.join(root, "y"))
    fetched = storage.download_tree(storage.join(root, "y"), tmp_path / "target")
    assert fetched == stored
    assert (tmp_path / "target/deep/b.txt").read_text() == "bb"


def test_the_last_files_of_a_tree_come_last_and_in_order(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.storage import trees

    for name in ("manifest.json", "_SUCCESS", "a", "b", "c"):
        (tmp_path / name).write_text(name)
    order: list[str] = []

    def upload(path: Path, uri: str, guard: storage.Guard, *, final: bool) -> None:
        order.append(path.name)
        storage.upload(path, uri)

    monkeypatch.setattr(trees, "upload", upload)
    storage.upload_tree(tmp_path, memory, last=("manifest.json", "_SUCCESS"))
    assert order[3:] == ["manifest.json", "_SUCCESS"]
    assert sorted(order[:3]) == ["a", "b", "c"]
    with pytest.raises(errors.InputError, match="gone"):
        storage.upload_tree(tmp_path, memory, last=("gone",))


def test_the_last_files_are_not_stored_when_another_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("a", "b", "_SUCCESS"):
        (source / name).write_text(name)
    (target / "b").mkdir(parents=True)  # a file cannot take the place of a directory
    (target / "b/file").touch()
    with pytest.raises(errors.InputError, match="target/b"):
        storage.upload_tree(source, str(target), last=("_SUCCESS",))
    assert not (target / "_SUCCESS").exists()


def test_links_are_followed_once_and_kubernetes_versions_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "..2024_01_01").mkdir()
    (tmp_path / "..2024_01_01/job.yaml").write_text("x")
    (tmp_path / "..data").symlink_to("..2024_01_01")
    (tmp_path / "job.yaml").symlink_to("..data/job.yaml")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert storage.list_files(str(tmp_path)) == (storage.Entry("job.yaml", 1),)


# Whole or not at all -----------------------------------------------------------------------


def test_a_failed_local_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with local.atomic_write(path) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208 - hidden names too


def test_a_killed_local_writer_leaves_nothing_visible(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    os.mkfifo(source)  # a source that stalls: the copy is under way for as long as we like
    code = (
        "import sys; from pathlib import Path; from job.storage import local\n"
        "with local.atomic_write(Path(sys.argv[2])) as part:\n"
        "    with open(sys.argv[1], 'rb') as f, open(part, 'wb') as g:\n"
        "        for byte in iter(lambda: f.read(1), b''): g.write(byte); g.flush()\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(source), str(target / "file")])
    with source.open("wb", buffering=0) as pipe:
        pipe.write(b"half")
        _wait_until(lambda: any(each.stat().st_size for each in target.iterdir()))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    (leftover,) = target.iterdir()
    assert leftover.name.startswith(INCOMPLETE_PREFIX)
    assert storage.list_files(str(target)) == ()
    assert storage.glob(f"{target}/*") == ()
    assert not storage.exists(str(target))

    an_hour_ago = time.time() - 3600
    os.utime(leftover, (an_hour_ago, an_hour_ago))
    storage.write_text(str(target / "other"), "x")
    assert not leftover.exists(), "the next writer removes what a dead one left"


def test_the_file_of_a_living_writer_is_not_swept(tmp_path: Path) -> None:
    busy = tmp_path / f"{INCOMPLETE_PREFIX}busy"
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(busy, (0, 0))
        storage.write_text(str(tmp_path / "other"), "x")
        assert busy.exists()


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([index]) * 100_000 for index in range(6)]
    threads = [
        threading.Thread(target=storage.write_bytes, args=(str(path), each)) for each in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


# What users must fix  ----------------------------------------------------------------------


def test_a_missing_file_is_an_input_error_that_names_it(root: str, tmp_path: Path) -> None:
    missing = storage.join(root, "gone.txt")
    for read in (storage.read_bytes, storage.size, storage.open_read):
        with pytest.raises(errors.InputError, match=r"gone\.txt"):
            read(missing)
    with pytest.raises(errors.InputError, match=r"gone\.txt"):
        storage.download(missing, tmp_path / "file")
    with pytest.raises(errors.InputError, match="not found"):
        storage.download_tree(missing, tmp_path / "tree")
    with pytest.raises(errors.InputError, match="not found"):
        storage.check_access(missing, "read")
    assert not (tmp_path / "file").exists()


def test_listing_a_file_or_reading_a_directory_says_so(root: str) -> None:
    storage.write_text(storage.join(root, "a/file"), "x")
    with pytest.raises(errors.InputError, match="is a file, not a directory"):
        storage.list_files(storage.join(root, "a/file"))
    with pytest.raises(errors.InputError, match=r"a directory|not found"):
        storage.size(storage.join(root, "a"))


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a\\..\\evil", "./a"])
def test_names_that_could_leave_the_directory_are_refused(
    name: str, memory: str, tmp_path: Path
) -> None:
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    key = f"/{memory.removeprefix('memory://')}/{name}"
    MemoryFileSystem.store[key] = MemoryFile(data=b"x")
    try:
        with pytest.raises(errors.InputError, match="could escape the directory") as raised:
            storage.download_tree(memory, tmp_path / "target")
        assert repr(name) in str(raised.value)
    finally:
        del MemoryFileSystem.store[key]
    assert list(tmp_path.rglob("*")) == []


def test_an_unknown_protocol_is_named_beside_those_installed() -> None:
    with pytest.raises(errors.InputError) as raised:
        storage.read_bytes("s4://bucket/key")
    for word in ("s4://", "s3", "hf", "https", "memory"):
        assert word in str(raised.value)


def test_a_protocol_without_its_package_says_which() -> None:
    with pytest.raises(errors.InputError, match="needs a package"):
        storage.read_bytes("gs://bucket/key")


@pytest.mark.parametrize("uri", ["hf://org/repo/file", "https://host/file", "http://host/file"])
def test_writing_to_a_read_only_protocol_is_refused_with_a_fix(uri: str, tmp_path: Path) -> None:
    assert storage.is_read_only(uri)
    (tmp_path / "file").touch()
    for write in (
        lambda: storage.write_text(uri, "x"),
        lambda: storage.upload(tmp_path / "file", uri),
        lambda: storage.upload_tree(tmp_path, uri),
        lambda: storage.delete(uri),
        lambda: storage.delete_tree(uri),
        lambda: storage.copy_tree(str(tmp_path), uri),
        lambda: storage.check_access(uri, "write"),
    ):
        with pytest.raises(errors.StorageError, match="is read-only") as raised:
            write()
        assert raised.value.problems[0].fix


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "/", "file:///", "memory://"])
def test_a_whole_bucket_or_file_system_is_never_deleted(uri: str) -> None:
    with pytest.raises(errors.StorageError, match="never deleted"):
        storage.delete_tree(uri)


def test_a_link_to_itself_is_an_input_error_however_it_is_used(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("link")
    for use in (
        storage.read_bytes,
        storage.delete_tree,
        storage.identity,
        partial(storage.check_access, mode="write"),
    ):
        with pytest.raises(errors.InputError) as raised:
            use(str(link))
        assert raised.value.problems[0].fix


def test_text_that_is_not_utf8_is_an_input_error(root: str) -> None:
    uri = storage.join(root, "latin1.txt")
    storage.write_bytes(uri, "grüße".encode("latin-1"))
    with pytest.raises(errors.InputError, match="not UTF-8"):
        storage.read_text(uri)


def test_write_access_is_proven_and_the_proof_removed(root: str) -> None:
    storage.check_access(storage.join(root, "out"), "write")
    assert storage.list_files(root) == ()
    storage.write_text(storage.join(root, "a.txt"), "x")
    storage.check_access(storage.join(root, "a.txt"), "read")
    storage.check_access(storage.join(root, "*.txt"), "read")


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root with CAP_SYS_ADMIN")
    try:
        with pytest.raises(errors.StorageError, match="no space left") as raised:
            storage.write_bytes(str(mount / "file"), bytes(4 * 2**20))
        assert str(mount) in str(raised.value)
        storage.write_bytes("memory://big", bytes(4 * 2**20))
        with pytest.raises(errors.StorageError, match="no space left"):
            storage.download("memory://big", mount / "file")
        assert os.listdir(mount) == []  # noqa: PTH208 - hidden names too
    finally:
        storage.delete("memory://big")
        subprocess.run(["umount", str(mount)], check=True)


def test_a_read_only_mount_is_an_input_error(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("mounting needs root with CAP_SYS_ADMIN")
    try:
        with pytest.raises(errors.InputError, match="mounted read-only"):
            storage.check_access(str(mount), "write")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_directory_of_another_user_is_an_input_error() -> None:
    """Root may write anywhere, so it becomes an ordinary user first."""
    closed = Path(tempfile.mkdtemp())  # not below tmp_path, which only its owner may enter
    closed.chmod(0o755 if os.getuid() == 0 else 0o555)
    code = (
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "import tenacity; from job import errors, storage\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: storage.check_access(sys.argv[1], 'write')\n"
        "except errors.InputError as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(closed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 12, done.stdout + done.stderr
    assert "access denied" in done.stdout
    assert str(closed) in done.stdout
    closed.rmdir()


# Retries -----------------------------------------------------------------------------------


def test_a_passing_failure_is_tried_again_and_each_retry_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    failing = iter([OSError(errno.EIO, "flaky"), TimeoutError("slow")])

    def work() -> str:
        for error in failing:
            raise error
        return "done"

    assert retry.call("read", "/mnt/nfs/file", work) == "done"
    lines = [line for line in capsys.readouterr().err.splitlines() if "attempt failed" in line]
    assert len(lines) == 2
    assert "uri=/mnt/nfs/file" in lines[0]
    assert "flaky" in lines[0]


def test_what_does_not_pass_ends_as_a_storage_error_with_its_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setenv(retry.RETRIES_VARIABLE, "2")
    with pytest.raises(errors.StorageError, match=r"cannot write after 3 attempts: .*reset"):
        retry.call("write", "s3://bucket/key", _raiser(ConnectionResetError("reset")))


def test_time_bounds_the_attempts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(retry, "TOTAL_SECONDS", 0.0)
    with pytest.raises(errors.StorageError, match="after 1 attempt:"):
        retry.call("write", "s3://bucket/key", _raiser(TimeoutError()))


def test_a_defect_is_not_disguised_as_a_failure_of_storage() -> None:
    with pytest.raises(TypeError):
        retry.call("read", "file", _raiser(TypeError("bug")))


def test_a_retry_count_that_is_no_number_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retry.RETRIES_VARIABLE, "many")
    with pytest.raises(errors.UsageError, match="many"):
        retry.call("read", "file", lambda: None)


def test_work_that_was_given_up_starts_no_attempt_and_waits_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 30)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 30)
    stop = threading.Event()
    started = time.monotonic()
    threading.Timer(0.05, stop.set).start()
    with retry.abandoned_if_set(stop), pytest.raises(retry.Abandoned):
        retry.call("read", "file", _raiser(TimeoutError()))
    assert time.monotonic() - started < retry.FIRST_WAIT
    assert retry.stop_event() is None


def test_a_signal_while_a_tree_is_copied_ends_it_at_once(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.storage import trees

    for index in range(20):
        (tmp_path / str(index)).touch()
    asked, once = threading.Event(), threading.Lock()

    def stall(path: Path, uri: str, guard: storage.Guard, *, final: bool) -> None:
        if once.acquire(blocking=False):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        asked.wait(60)
        retry.call("write", uri, lambda: None)

    def stop(*_: object) -> None:
        raise errors.Stopped("SIGALRM", "stop")

    monkeypatch.setattr(trees, "upload", stall)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        started = time.monotonic()
        with pytest.raises(errors.Stopped):
            storage.upload_tree(tmp_path, memory)
        assert time.monotonic() - started < 30
    finally:
        signal.signal(signal.SIGALRM, before)
        asked.set()


def test_secrets_and_signatures_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    error = failures.LOCAL.explain(
        PermissionError("denied for very-secret-value"),
        "read",
        "https://user:hunter2@host/file?X-Amz-Signature=abc123&x=1",
    )
    assert isinstance(error, errors.InputError)
    for secret in ("very-secret-value", "hunter2", "abc123"):
        assert secret not in str(error)
    assert "https://***@host/file?X-Amz-Signature=***&x=1" in str(error)


# Plain HTTP --------------------------------------------------------------------------------


class _Quiet(SimpleHTTPRequestHandler):
    failures_left = 0

    def do_GET(self) -> None:
        if type(self).failures_left > 0:
            type(self).failures_left -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def http(tmp_path: Path) -> Iterator[str]:
    served = tmp_path / "served"
    served.mkdir()
    (served / "data.txt").write_text("0123456789")
    _Quiet.failures_left = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_http_files_are_read_downloaded_and_sized(http: str, tmp_path: Path) -> None:
    uri = f"{http}/data.txt"
    assert storage.read_text(uri) == "0123456789"
    assert storage.read_bytes(uri, limit=3) == b"012"
    assert storage.size(uri) == 10
    assert storage.exists(uri)
    storage.download(uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "0123456789"
    with storage.open_read(uri) as file:
        file.seek(8)
        assert file.read() == b"89"


def test_http_has_no_listings_and_misses_files(http: str) -> None:
    with pytest.raises(errors.InputError, match="no listings"):
        storage.list_files(http)
    with pytest.raises(errors.InputError, match=r"gone\.txt"):
        storage.read_bytes(f"{http}/gone.txt")
    assert not storage.exists(f"{http}/gone.txt")


def test_http_failures_that_pass_are_tried_again(
    http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    _Quiet.failures_left = 2
    assert storage.read_text(f"{http}/data.txt") == "0123456789"


def test_an_http_server_that_is_down_is_a_storage_error(
    http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setenv(retry.RETRIES_VARIABLE, "1")
    for ask in (storage.exists, storage.read_bytes, storage.size):
        with pytest.raises(errors.StorageError, match=r"after 2 attempts: .*annot connect"):
            ask("http://127.0.0.1:9/file")


def _raiser(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def _wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# Stored JSON -------------------------------------------------------------------------------


def test_stored_json_that_is_damaged_or_nested_without_end_is_a_value_error() -> None:
    assert storage.parse_json(b'{"a": [1]}') == {"a": [1]}
    for damaged in ('{"a": ', "[" * 100_000):
        with pytest.raises(ValueError, match=r"Expecting value|nested too deeply"):
            storage.parse_json(damaged)

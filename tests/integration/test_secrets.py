"""Keys are planted wherever a job may meet one; then all that it wrote is searched for them."""

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from job import storage
from tests.conftest import S3
from tests.jobs import Finished, job, small_run_of_rows
from tests.s3 import WRITER, free_ports

ENVIRONMENT = {
    "HF_TOKEN": "hf_plantedHubToken0123456789",
    "WANDB_API_KEY": "planted/tracker+key=0123456789",
    "MLFLOW_TRACKING_URI": "https://tracker:planted-mlflow@tracker.invalid",
    "MLFLOW_TRACKING_PASSWORD": 'planted"quoted\\password',
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey=plantedAzureKey==;",
    "DB_PASS": "planted/pass'word",
    "MY_PWD": "planted-pwd",
    "STORE_KEY": "planted-store-key",
    "GIT_PAT": "planted-pat",
    "BLOB_SAS": "sv=2022-11-02&sig=planted%2Bsas",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJwbGFudGVkIjoxfQ.planted_jwt",
    "ANYTHING": "Zq3vX9kLm2Np8RtYw5",
    "SIGNING": "-----BEGIN PRIVATE KEY-----\nMIIEvplantedPrivateKey0123\n-----END PRIVATE KEY-----",
    "AWS_LIKE": "AKIAPLANTED0EXAMPLE0",
}
READ = "Read " + " ".join(f"${{{name}}}" for name in ENVIRONMENT if name != "SIGNING")
"""An instruction that holds every secret of the environment."""
CONTROL = "\x1b]8;;https://h\x1b\\x\x9b2J\u202e"
PASSWORD, SIGNATURE, IN_A_ROW = "planted-password", "planted%2Bsignature", "planted-in-a-row"
PARTS = ("planted-mlflow", "plantedAzureKey==", "planted%2Bsas", "MIIEvplantedPrivateKey0123")
PLANTED = (*ENVIRONMENT.values(), *PARTS, PASSWORD, SIGNATURE, IN_A_ROW, WRITER[1])


DATA = (".arrow", ".safetensors", ".pyc")
TOLD = ("", ".json", ".jsonl", ".yaml", ".html", ".txt")
STEERS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]"


def spellings(secret: str) -> Iterator[bytes]:
    for text in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]):
        yield text.encode()
    yield base64.b64encode(secret.encode()).rstrip(b"=")


def row(number: int) -> dict[str, str]:
    file = io.BytesIO()
    Image.new("RGB", (80 + number, 40), (number * 5, 0, 0)).save(file, "PNG")
    image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    # What a model learns from is data, and is stored as it is; what is told of it is not.
    secret = list(ENVIRONMENT.values())[number % len(ENVIRONMENT)]
    held = f"{secret} {CONTROL}" if number % 2 else ""
    return {"image": image, "text": f"x_{{{number}}} {held}", "id": f"{number} {held}"}


@dataclass
class Web:
    """A server of one list, for who has its password."""

    uri: str = ""
    status: int = 200


@pytest.fixture
def web() -> Iterator[Web]:
    found = Web()
    rows: list[dict[str, str]] = [row(number) for number in range(24)]
    rows.append({"image": f"https://pictures.invalid/1.png?sig={IN_A_ROW}", "text": "x"})
    rows.append({"image": "x" * 180 + ENVIRONMENT["HF_TOKEN"], "text": "x"})
    body = "".join(json.dumps(each) + "\n" for each in rows).encode()
    basic = "Basic " + base64.b64encode(f"reader:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            allowed = self.headers.get("Authorization") == basic and SIGNATURE in self.path
            status = found.status if allowed else 401
            sent = body if status == 200 else b"refused"
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(sent)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        found.uri = f"http://reader:{PASSWORD}@{host}/rows.jsonl?X-Amz-Signature={SIGNATURE}"
        yield found
        server.shutdown()


# The kubelet's file is where tests may not write.
COMMAND = """
import sys
from pathlib import Path
from job.cli import app, termination
termination.TERMINATION_LOG = Path(sys.argv.pop(1))
app.main()
"""


def run(place: Path, *arguments: str, environ: dict[str, str]) -> Finished:
    (place / "termination-log").touch()
    done = job(
        str(place / "termination-log"),
        *arguments,
        environ={**ENVIRONMENT, **environ},
        code=COMMAND,
    )
    (place / "stdout").write_text(done.out)
    (place / "stderr").write_text(done.err)
    return done


def nothing_planted_in(place: Path) -> int:
    """Searches every file below `place`; gives how many there are."""
    files = [path for path in place.rglob("*") if path.is_file() and path.suffix not in DATA]
    for path in files:
        data = path.read_bytes()
        if path.suffix in TOLD:
            steering = re.search(STEERS, data.decode(errors="replace"))
            assert not steering, f"{path} holds {steering}"
        for secret in PLANTED:
            for spelled in spellings(secret):
                at = data.find(spelled)
                assert at < 0, f"{path} holds {secret}: …{data[max(0, at - 200) : at + 60]!r}"
    return len(files)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("prep", ("--debug",)),
        pytest.param("run", ("--debug", "--log-format", "json"), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_succeeds_writes_no_secret_anywhere(
    command: str, options: tuple[str, ...], s3: S3, web: Web, tmp_path: Path
) -> None:
    more = ("--set", "data.max_bad_rows=2", "--set", f"data.instruction={READ}")
    ids = ("--set", "data.train.columns.id=id", "--set", "train.max_length=4096")
    _, *arguments = small_run_of_rows(web.uri, s3.uri("out"), *more, *ids, cache=tmp_path / "cache")
    done = run(tmp_path, *options, command, *arguments, environ=s3.environ)
    assert done.code == 0, done.err
    storage.download_tree(s3.uri("out"), tmp_path / "out")
    # Where they would be is there, with what stands for them.
    shown = web.uri.replace(f"reader:{PASSWORD}", "***").replace(SIGNATURE, "***")
    for name in ("run.json", "spec.resolved.yaml", *(("report.html",) if command == "run" else ())):
        assert shown in (tmp_path / "out" / name).read_text(), name
    rejects = (tmp_path / "out" / "data" / "rejects.jsonl").read_text()
    assert "?sig=***" in rejects
    assert "${HF_TOK" in rejects
    resolved = (tmp_path / "out" / "spec.resolved.yaml").read_text()
    assert READ in " ".join(resolved.split())
    if command == "run":
        answers = (tmp_path / "out" / "eval" / "predictions.jsonl").read_text()
        assert "${" in answers
        assert "\\u009b2J" in answers
    assert nothing_planted_in(tmp_path) > (30 if command == "run" else 10)


FAILING = {
    "a list that is refused": (12, 403, ()),
    "a list that its server cannot give": (21, 500, ()),
    "rows that are refused": (11, 200, ("--set", "data.max_bad_rows=0")),
    "a value that cannot be": (10, 200, ("--set", f"train.optim=x{'y' * 200}?token={IN_A_ROW}")),
    "an output without its protocol": (12, 200, ("--output", f"planted://me:{PASSWORD}@host/x")),
}


@pytest.mark.parametrize(("code", "status", "more"), FAILING.values(), ids=FAILING.keys())
def test_a_run_that_fails_writes_no_secret_anywhere(
    code: int, status: int, more: tuple[str, ...], web: Web, tmp_path: Path
) -> None:
    web.status = status
    arguments = small_run_of_rows(web.uri, str(tmp_path / "out"), cache=tmp_path / "cache")
    done = run(tmp_path, "--debug", *arguments, *more, environ={})
    assert done.code == code, done.err
    assert "Traceback" in done.err
    assert (tmp_path / "termination-log").read_text()
    if code in (11, 12, 21) and "--output" not in more:
        assert (tmp_path / "out" / "sbom.cdx.json").is_file()
        assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert nothing_planted_in(tmp_path) >= 3


def test_a_store_that_is_away_is_told_without_its_password(tmp_path: Path) -> None:
    [port] = free_ports(1)
    environ = {
        "AWS_ENDPOINT_URL": f"http://me:{PASSWORD}@127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "planted-id",
        "AWS_SECRET_ACCESS_KEY": WRITER[1],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    arguments = small_run_of_rows("rows.jsonl", "s3://bucket/out", cache=tmp_path / "cache")
    done = run(tmp_path, "--debug", *arguments, environ=environ)
    assert done.code == 21, done.err
    assert "Traceback" in done.err
    nothing_planted_in(tmp_path)

"""Secrets out of whatever is written, in every spelling, wherever the text goes."""

import json
import pickle
import subprocess
import sys
from urllib.parse import quote_plus

import pytest

from job import log, redaction
from job.errors import JobError, Problem, SpecError
from job.manifest import RunRecord
from job.redaction import redact, redacted
from tests.jobs import ROOT

SECRET = 'pl4nted/value+"of"\\a\nkey'


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", {})
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "DB_PASSWORD", "MY_API_KEY"),
        *("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "AZURE_STORAGE_CONNECTION_STRING"),
        *("AZURE_STORAGE_KEY", "SSH_PRIVATE_KEY", "GPG_PASSPHRASE"),
    ],
)
def test_a_variable_of_such_a_name_holds_a_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "value-of-it")
    assert redact("a value-of-it b") == f"a ${{{name}}} b"


@pytest.mark.parametrize("name", ["PWD", "HOME", "KEYBOARD", "AWS_REGION", "MONKEY", "TASS"])
def test_other_variables_are_left_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "value-of-it")
    assert redact("a value-of-it b") == "a value-of-it b"


@pytest.mark.parametrize(
    "spelled", [SECRET, json.dumps(SECRET), repr(SECRET), quote_plus(SECRET)], ids=repr
)
def test_a_secret_is_known_in_every_spelling(spelled: str) -> None:
    assert "pl4nted" not in redact(f"x {spelled} y")
    assert redact(f"x {spelled} y").count("${WANDB_API_KEY}") == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://me:pass@host/x", "sftp://***@host/x"),
        ("sftp://me:p@ss:w@host/x", "sftp://***@host/x"),
        ("redis://:pass@host/0", "redis://***@host/0"),
        ("https://hf_pass@host/x", "https://***@host/x"),
        ("https://h/x?X-Amz-Signature=pass&X-Amz-Date=1", "https://h/x?X-Amz-Signature=***&X-Amz-Date=***"),
        ("https://h/x?a=1&amp;sig=pass", "https://h/x?a=1&amp;sig=***"),
        ("https://h/x?X-Goog-Signature=pass'", "https://h/x?X-Goog-Signature=***'"),
        ("https://h/x?access_token=pass\"", "https://h/x?access_token=***\""),
        ("https://h/x?AWSAccessKeyId=pass&Signature=pass", "https://h/x?AWSAccessKeyId=***&Signature=***"),
    ],
)  # fmt: skip
def test_what_a_url_holds_of_a_secret_is_hidden(url: str, shown: str) -> None:
    assert redact(f"at {url} it failed") == f"at {shown} it failed"


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/repo@main/x",
        "s3://bucket/a:b@c",
        "http://127.0.0.1:8080/x@y",
        "https://h/x?page=2&format=json",
        "tokens=12 key=value",
        "user@host",
    ],
)
def test_what_holds_none_stays(text: str) -> None:
    assert redact(text) == text


def test_texts_in_lists_and_mappings_are_redacted_and_nothing_else() -> None:
    value = {"a": [SECRET, 1, None, {"b": (SECRET, 2.5)}], SECRET: True}
    name = "${WANDB_API_KEY}"
    assert redacted(value) == {"a": [name, 1, None, {"b": [name, 2.5]}], SECRET: True}


def test_what_steers_a_terminal_or_ends_a_line_is_written_out() -> None:
    assert redaction.printable("a\x1b[2J\x9b\x85\u2028\ud800b é∑🙂") == (
        "a\\x1b[2J\\x9b\\x85\\u2028\\ud800b é∑🙂"
    )
    assert redaction.printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert "\x1b" not in str(JobError("$", "why", value="\x1b]0;x"))


def test_an_error_holds_no_secret_from_the_start() -> None:
    long = "x" * 100 + "https://h/?sig=" + "s" * 100  # cut in the middle when it is shown
    error = JobError(SECRET, f"why {SECRET}", value=long, fix=f"not {SECRET}")
    several = SpecError.from_problems([Problem("$", SECRET), Problem("$", "b", SECRET)])
    for each in (error, several, pickle.loads(pickle.dumps(error))):  # noqa: S301 - our own
        assert "pl4nted" not in f"{each} {each!r} {each.problems}"
        assert "sss" not in f"{each} {each.problems}"


def test_the_record_of_a_run_holds_none() -> None:
    record = RunRecord(name="a", command="run", status="failed", started="now")
    record.inputs = {"train": {"uri": f"s3://b/{SECRET}"}}
    record.error = [{"message": SECRET}]
    record.warnings.append(SECRET)
    assert "pl4nted" not in record.to_text()
    assert json.loads(record.to_text())["error"] == [{"message": "${WANDB_API_KEY}"}]


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_line_holds_none_whatever_its_fields_are(
    style: log.Format, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure(style)
    log.info(f"event {SECRET}", text=SECRET, error=ValueError(SECRET), many=[SECRET])
    err = capsys.readouterr().err
    assert "pl4nted" not in err
    assert err.count("${WANDB_API_KEY}") == 4
    if style == "json":
        assert json.loads(err)["text"] == "${WANDB_API_KEY}"


SCRIPT = """
import logging, os, sys, threading, warnings
from job import log, redaction
redaction.install()
log.configure("text")
secret = os.environ["WANDB_API_KEY"]
warnings.warn(f"a warning of {secret}")
logging.getLogger("library").error("an error of %s", secret)
def fail(): raise ValueError(f"in a thread: {secret}")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
try:
    raise KeyError(secret)
except KeyError as error:
    raise ValueError(f"at the end: {secret}") from error
"""


def test_pythons_own_words_hold_none() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "pl4nted" not in done.stderr
    for told in ("a warning of", "library: an error of", "in a thread:", "KeyError", "at the end:"):
        assert told in done.stderr
    assert done.stderr.count("Traceback") == 3

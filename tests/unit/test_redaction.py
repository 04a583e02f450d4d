"""Secrets out of whatever is written, in every spelling, wherever the text goes."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job import log, redaction
from job.artifacts.records import RunRecord
from job.errors import JobError, Problem, SpecError
from job.evaluation.evaluate import Evaluation, Prediction, write
from job.prep.workers import worker_pool
from job.redaction import as_json, redact, redacted
from tests.jobs import ROOT

CONTROLS = (*("\x00-\x08\x0b-\x1f\x7f-\x9f", "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"),)
CONTROL = [
    *("\x1b]8;;https://h\x1b\\", "\x1b[2J", "\x9b2J", "\x07", "\r", "\x08", "\x7f", "\x85"),
    *("\u202e", "\u2066", "\u200f", "\u2028"),
]
SECRET = 'pl4nted/value+"of"\\a\nkey'


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", {})
    # Random, and taken for a secret: what is written of a text may depend on its first letter.
    monkeypatch.delenv("PYTEST_XDIST_TESTRUNUID", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "DB_PASSWORD", "MY_API_KEY"),
        *("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "AZURE_STORAGE_CONNECTION_STRING"),
        *("AZURE_STORAGE_KEY", "SSH_PRIVATE_KEY", "GPG_PASSPHRASE", "DB_PASS", "FTP_PWD", "X_KEY"),
        *("GITHUB_PAT", "BLOB_SAS", "JWT", "MY_JWT", "apiKey", "accessToken", "dbPass", "NPM_AUTH"),
        *("SENTRY_DSN", "AWS_ACCESS_KEY_ID", "API_KEYS", "SESSION_COOKIE"),
    ],
)
def test_a_variable_of_such_a_name_holds_a_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "value-of-it")
    assert redact("a value-of-it b") == f"a ${{{name}}} b"


@pytest.mark.parametrize(
    "name",
    [
        *("PWD", "OLDPWD", "HOME", "KEYBOARD", "AWS_REGION", "MONKEY", "TASS", "PATH", "COMPASS"),
        *("TOKENIZERS_PARALLELISM", "MAX_NEW_TOKENS", "IMAGE_KEY", "PUBLIC_KEY", "SSH_AUTH_SOCK"),
        *("HF_TOKEN_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_other_variables_are_left_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "value-of-it")
    assert redact("a value-of-it b") == "a value-of-it b"


@pytest.mark.parametrize(
    "spelled", [SECRET, json.dumps(SECRET), repr(SECRET), quote_plus(SECRET)], ids=repr
)
def test_a_secret_is_known_in_every_spelling(spelled: str) -> None:
    assert "pl4nted" not in redact(f"x {spelled} y")
    assert redact(f"x {spelled} y").count("${WANDB_API_KEY}") == 1


def test_what_json_lacks_is_null() -> None:
    given = {"loss": math.nan, "lr": 0.5, "all": [1, (math.inf, {"x": -math.inf})], "s": "NaN"}
    expected = {"loss": None, "lr": 0.5, "all": [1, [None, {"x": None}]], "s": "NaN"}
    assert json.loads(as_json(given)) == expected
    assert "NaN" not in as_json({"loss": math.nan}, indent=2)


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
        ("https://h/x?apikey=pass", "https://h/x?apikey=***"),
        ("https://h/x?api-key=pass&p=1", "https://h/x?api-key=***&p=1"),
        ("https://h/x?accessToken=pass", "https://h/x?accessToken=***"),
        ("https://h/x?jwt=pass", "https://h/x?jwt=***"),
        ("https://h/x?a=1#access_token=pass", "https://h/x?a=1#access_token=***"),
        ("https://h/x?api%5Fkey=pass", "https://h/x?api%5Fkey=***"),
        ("https://h/x?k=Zq3vX9kLm2Np8RtYw5", "https://h/x?k=***"),
        ("ftp://me:pa/ss@host/x", "ftp://***@host/x"),
        ("ftp://me:pa'ss\"w@host/x", "ftp://***@host/x"),
        ("'ftp://me:pass@host', 'a@b'", "'ftp://***@host', 'a@b'"),
        ("s3://pass@bucket/x", "s3://***@bucket/x"),
        ("https%3A%2F%2Fme%3Apass%40host%2Fx", "https://***@host/x"),
        ("https%253A%252F%252Fh%252F%253Ftoken%253Dpass", "https://h/?token=***"),
        ("AccountName=a;AccountKey=pass==;", "AccountName=a;AccountKey=***;"),
        ("sv=2022-11-02&sig=passpasspass%2Bpass", "sv=2022-11-02&sig=***"),
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
        "https://h/x?page=2&format=json&token_type=a",
        "https://h/x?versionId=3HL4kqtJlcpXroDTDmJrmSpXd3dIbrHY",
        "hf://gpt2@main/x",
        "abfs://container@account.dfs.core.windows.net/x",
        "ssh://git@host/x",
        "http://[::1]:80/x@y",
        r"\begin{align} a &= b & c &= d \end{align}",
        "100%25 of 50%",
        "hf_transformersmodel of sk-toy-dataset-for-testing",
        "a task-level-estimate-of-everything",
        "the eyJ of a header alone",
        "tokens=12 key=value",
        "user@host",
    ],
)
def test_what_holds_none_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijKLMNOPqrstuvwx",
        "sk-proj-abcDEF0123456789abcdef",
        "ghp_abcdefghijklmnopqrst0123456789",
        "github_pat_11ABCDEFG0abcdefghijk_lmnop",
        "glpat-abcdefghij0123456789",
        "xoxb-123456789012-abcdefGHIJ",
        "AKIAIOSFODNN7EXAMPLE",
        "ASIAIOSFODNN7EXAMPLE",
        "AIzaSyA-abcdefghijklmnopqrstuvwxyz01234",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc+/=\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\\nMIIEabc+/=\\n-----END PRIVATE KEY-----",
    ],
)
def test_a_secret_of_a_known_form_is_hidden_wherever_it_stands(secret: str) -> None:
    for before, after in (("at ", " it failed"), ("key=", ","), ('"', '"'), ("/", "/x")):
        assert redact(before + secret + after) == f"{before}***{after}"


@pytest.mark.parametrize(
    "value",
    [
        "Zq3vX9kLm2Np8RtYw5",
        "8c7dd922ad47494fc02c388e12c00eac",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "hf_abcdefghijKLMNOPqrstuvwx",
        "AccountName=a;AccountKey=Zq3vX9kLm2Np8RtYw5==",
    ],
)
def test_a_value_that_looks_like_a_secret_is_one_under_any_name(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYTHING", value)
    assert redact(f"a {value} b") == "a ${ANYTHING} b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STEPS", "100"),
        ("RATE", "2e-5"),
        ("COMPILE", "false"),
        ("USE_TOKEN", "disabled"),
        ("SOURCE", "s3://bucket/runs/8c7dd922ad47494fc02c388e12c00eac/out"),
        ("SOURCE", "hf://Qwen/Qwen2-VL-7B-Instruct@main"),
        ("SOURCE", "/mnt/pvc-0f3c2b1a-1111-4222-8333-abcdefabcdef/data"),
        ("SOURCE", "outputs/latex"),
        ("TEXT", "Write the formula as LaTeX, on one line."),
        ("TARGETS", "[q_proj, k_proj, v_proj, o_proj]"),
        ("NAME", "ernie-4.5-vl-28b-a3b-latex-20240110T120000Z"),
        ("GIT_COMMIT", "a02bc15e4a8fc9d4e9a4e831a9aa124895b1df98"),
        ("RUN_ID", "0f3c2b1a111142228333abcdefabcdef"),
        ("HOSTNAME", "finetune-job-7d9f8b6c5-x2k4p"),
    ],
)
def test_what_an_ordinary_run_reads_stays_readable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"a {value} b") == f"a {value} b"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("https://me:pl4nted@host/x", "pl4nted"),
        ("https://me:pl4nted%2Fpart@host/x", "pl4nted/part"),
        ('https://host/x?token=pl4nted"quoted', 'pl4nted"quoted'),
        ("AccountName=a;AccountKey=pl4nted==;EndpointSuffix=x", "pl4nted=="),
        ('{"type": "service_account", "private_key_id": "pl4nted-0123456789"}', "pl4nted-0123"),
        ("first line\npl4nted-second-line\nx", "pl4nted-second-line"),
    ],
)
def test_a_part_of_a_secret_is_hidden_where_it_stands_alone(
    value: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "private_key" in value:
        part = "pl4nted-0123456789"
    monkeypatch.setenv("SOME_URL" if "://" in value else "SOME_CREDENTIALS", value)
    assert "pl4nted" not in redact(f"Access denied ({part})")


letters = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="<>\\"),
    min_size=8,
    max_size=40,
)


@given(
    secret=letters, spelled=st.lists(st.booleans(), min_size=40, max_size=40), case=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_a_known_secret_is_hidden_in_any_spelling_of_a_url(
    secret: str, spelled: list[bool], case: bool
) -> None:
    redaction._known = {}  # as the fixture does, once a test
    redaction.add_secret("PLANTED", secret)
    style = "%%%02X" if case else "%%%02x"
    text = "".join(
        style % ord(each) if as_code or each in "%&#?" else each
        for each, as_code in zip(secret, spelled, strict=False)
    )
    for url in (f"https://h/{text}/x", f"https://h/x?a={text}&b=1", f"ftp://me:{text}@h/x"):
        shown = redact(f"at {url} it failed")
        assert secret not in unquote(shown), shown
        assert shown.startswith("at ")
        assert shown.endswith(" it failed")


@given(
    secret=st.text("abcXYZ0189-._~/'\"@!$()*+,;=:", min_size=3, max_size=20),
    name=st.sampled_from(
        ["apikey", "api_key", "apiKey", "API-KEY", "accessToken", "jwt", "x-auth-token", "pwd"]
    ),
)
@settings(max_examples=60, deadline=None)
def test_what_a_spec_says_in_a_url_is_hidden_though_no_variable_holds_it(
    secret: str, name: str
) -> None:
    redaction._known = {}  # as the fixture does, once a test
    # Else the secret is a mark between other words, or what is written in its place.
    secret = f"pl{secret}nted"
    for url in (f"https://h/x?{name}={quote(secret, safe='')}", f"ftp://me:{secret}@h/x"):
        redaction.add_secrets_of(url)
        assert secret not in unquote(redact(f"at {url} it failed"))
        assert secret not in redact(f"401: {secret} is refused")


def test_the_environment_is_looked_at_again_only_where_it_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[str] = []

    def is_secret(name: str, value: str) -> bool:
        looked.append(name)
        return name == "LATER"

    monkeypatch.setattr(redaction, "is_secret", is_secret)
    for _ in range(1000):
        redact("a line")
    assert len(looked) <= len(os.environ)
    monkeypatch.setenv("LATER", "a later value")
    assert redact("a later value") == "${LATER}"


def test_predictions_hold_no_secret_and_steer_no_terminal(tmp_path: Path) -> None:
    texts = (f"a {SECRET} b", "a\x1b[2J\x9b2J\u202e")
    rows = tuple(
        Prediction(
            id=each,
            row=n,
            turn=1,
            asked=[{"role": "user", "content": [{"type": "text", "text": each}]}],
            label=each,
            prediction=each,
            cut_short=False,
            score={"wrong": [each]},
        )
        for n, each in enumerate(texts)
    )
    evaluation = Evaluation(
        metrics={},
        predictions=rows,
        seconds=1,
        tokens_per_second=1,
        rows=2,
        answer="text",
        turns="all",
        max_new_tokens=1,
        cannot_be_right=0,
        details={"classes": list(texts)},
    )
    write(evaluation, tmp_path, "e", "p")
    summary = (tmp_path / "eval" / "e.json").read_text(encoding="utf-8")
    assert SECRET not in summary
    assert not re.search(f"[{''.join(CONTROLS)}]", summary)
    written = (tmp_path / "eval" / "p").read_text(encoding="utf-8")
    assert not re.search(f"[{''.join(CONTROLS)}]", written)
    first, second = map(json.loads, written.splitlines())
    assert first["id"] == first["label"] == first["prediction"] == "a ${WANDB_API_KEY} b"
    assert second["prediction"] == texts[1]


def test_a_worker_process_knows_the_secrets_of_the_spec() -> None:
    redaction.add_secrets_of("https://me:typed-by-hand@host/x")
    with worker_pool(1) as workers:
        assert workers.submit(redact, "denied for typed-by-hand").result() == "denied for ***"


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


def test_what_only_shows_is_left_as_it_is() -> None:
    text = "a\u3000b\u00a0c \U0001f469\u200d\U0001f52c e\u0301"
    assert redaction.printable(text) == text


@pytest.mark.parametrize("steering", CONTROL)
def test_nothing_that_is_shown_or_stored_as_json_steers_a_terminal(steering: str) -> None:
    value = {"text": f"a{steering}b\nc"}
    text = redaction.as_json(value)
    assert not re.search(f"[{''.join(CONTROLS)}]", text), text
    assert json.loads(text) == value
    shown = redaction.shown(f"a{steering}b\nc\td")
    assert not re.search(f"[{''.join(CONTROLS)}]", shown), shown
    assert shown.endswith("b\nc\td")


def written(pieces: list[str]) -> list[str]:
    found: list[str] = []
    screen = redaction.RedactingWriter(found.append)
    for piece in pieces:
        screen.write(piece)
    screen.close()
    return found


def test_a_secret_that_comes_in_pieces_is_never_shown() -> None:
    for secret, name in ((SECRET, "${WANDB_API_KEY}"), ("hf_abcdefghijKLMNOPqrstuvwx", "***")):
        for size in (1, 3, 7):
            text = f"a {secret} b"
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            assert "".join(written(pieces)) == f"a {name} b"


def test_pieces_that_begin_no_secret_are_written_at_once() -> None:
    pieces = ["\\frac{", "1}", "{2}", " &", "= [3]^", "{2}"]
    assert written(pieces) == [*pieces, ""]
    assert written(["1\x1b[2", "J\x9b"]) == ["1\\x1b[2", "J\\x9b", ""]


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

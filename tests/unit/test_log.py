"""What the job says: structured where nobody watches, and never a secret."""

import json
import logging
import math
import re
import subprocess
import sys

import pytest

from job import log


@pytest.fixture(autouse=True)
def _plain() -> None:
    log.configure("text")


def test_text_lines_hold_the_event_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("train", step="1/4", loss=0.123456, note="two words")
    assert capsys.readouterr().err.endswith(' INFO train step=1/4 loss=0.1235 note="two words"\n')


def test_json_lines_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json")
    log.warn("retry", attempt=2, cause='a "quoted" cause')
    record = json.loads(capsys.readouterr().err)
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "WARNING",
        "event": "retry",
        "attempt": 2,
        "cause": 'a "quoted" cause',
    }


def test_what_libraries_say_is_json_too(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging; from job import log; log.configure('json');"
        "logging.getLogger('library').error('two\\nlines')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    record = json.loads(capfd.readouterr().err)
    assert record["event"] == "library: two\nlines"
    assert record["level"] == "ERROR"


HOSTILE = "a\x1b]8;;https://h\x07\x9b2J\u202e[red]b[/] \\[bold]c[/nothing]"


@pytest.mark.parametrize("style", ["auto", "text", "json"])
def test_nothing_of_a_line_steers_a_terminal_or_is_read_as_markup(
    style: log.Format, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "is_terminal", lambda _: style == "auto")
        patch.setenv("NO_COLOR", "1")
        patch.setenv("TERM", "dumb")
        log.configure(style)
        log.warn(HOSTILE, file=HOSTILE, error=ValueError(HOSTILE))
        with log.progress(HOSTILE, 2) as bar:
            bar.advance(file=HOSTILE)
        logging.getLogger("library").error(HOSTILE)
    said = capsys.readouterr().err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said), said
    if style != "json":
        assert "[red]b[/] \\[bold]c[/nothing]" in said.replace("\\\\", "\\")
    else:
        assert json.loads(said.splitlines()[0])["event"] == HOSTILE


def test_an_event_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("a\n12:00:00 ERROR forged", field="b\n12:00:00 ERROR forged")
    assert capsys.readouterr().err.count("\n") == 1


def test_work_of_which_nothing_is_done_yet_has_no_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with log.progress("decode", 100, "answers") as bar:
        monkeypatch.setattr("time.monotonic", lambda: math.inf)  # the next line is due
        bar.advance(0)
    line = capsys.readouterr().err
    assert "done=0/100" in line
    assert "left" not in line


def test_quiet_keeps_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("text", "WARNING")
    log.info("hidden")
    log.error("shown")
    err = capsys.readouterr().err
    assert "shown" in err
    assert "hidden" not in err


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (2e-5, "2e-05"),
        (999.4, "999.4"),
        (999.7, "1,000"),
        (195900.0, "195,900"),
        (-1650.2, "-1,650"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_numbers_read_as_people_write_them(
    value: float, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.info("train", tokens_per_second=value)
    log.metrics({"bleu": (value, value)})
    said = capsys.readouterr().err
    assert f" tokens_per_second={shown}\n" in said
    assert f"bleu: {shown} → {shown}\n" in said


def test_large_numbers_stay_numbers_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json")
    log.info("train", tokens_per_second=195900.25)
    assert json.loads(capsys.readouterr().err)["tokens_per_second"] == 195900.25


def test_a_fast_rate_has_no_exponent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 1.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(seconds))
    with log.progress("prep", 1650) as work:
        work.advance(1650)
    assert 'rate="1,650 rows/s"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "shown"), [(8.24, "8.2s"), (200, "3m20s"), (7500, "2h05m"), (59.96, "60.0s")]
)
def test_durations_read_as_people_say_them(seconds: float, shown: str) -> None:
    assert log.duration(seconds) == shown


@pytest.mark.parametrize(("count", "shown"), [(812, "812 B"), (3.4 * 2**20, "3.4 MiB")])
def test_sizes_read_as_people_say_them(count: float, shown: str) -> None:
    assert log.size(count) == shown


@pytest.mark.parametrize(("level", "shown"), [("INFO", True), ("WARNING", False)])
def test_quiet_shows_no_bar_on_a_terminal(
    level: log.Level, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "is_terminal", lambda _: True)
        patch.setenv("FORCE_COLOR", "1")  # rich asks the stream itself, which is pytest's
        patch.setenv("TERM", "xterm")
        log.configure("auto", level)
        with log.progress("work", 2, "steps") as bar:
            bar.advance()
    assert ("work" in capsys.readouterr().err) == shown

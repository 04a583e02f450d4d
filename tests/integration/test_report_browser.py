"""The report in a real browser: no requests, no overflow, and visible images."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from job.evaluation.comparison import compare
from job.evaluation.comparison.page import write
from job.evaluation.report import render
from tests import browser
from tests.jobs import job, small_run
from tests.reports import HOSTILE, of_task, prediction, results
from tests.stored_runs import STAGES, Made, store

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

WIDTHS = (1200, 400)
COMPARED = (".aside", ".lacks", ".code", "td small", ".change.worse", ".tag.bad", ".legend")
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a whole small run."""
    output = tmp_path_factory.mktemp("run")
    done = job(*small_run(str(output), cache=tmp_path_factory.mktemp("cache")))
    assert done.code == 0, done.err
    return output / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of nine runs, one of which has failed."""
    place = tmp_path_factory.mktemp("runs")
    validation = {step: {"eval_loss": 3 / step, "eval_cer": 1 / step} for step in (10, 20, 30, 40)}
    made = [Made(wrong=range(1 + n % 3), sets=(f"lora.r={n + 1}",)) for n in range(7)]
    made += [Made(validation=validation), Made(stages=STAGES[:2])]
    for number, each in enumerate(made):
        store(str(place / str(number)), place / "work", each)
    write(compare([str(place / str(number)) for number in range(9)]), str(place / "page.html"))
    return place / "page.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    found = browser.find()
    if found is None:
        pytest.skip("no Chromium: `make test-slow` brings one where npm is, or install chromium")
    with browser.opened(found) as running:
        yield running


@dataclass
class Seen:
    """A page, and what happened while it was opened."""

    page: "Page"
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(params=[(w, s) for w in WIDTHS for s in SCHEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def seen(request: pytest.FixtureRequest, chromium: "Browser", report: Path) -> Iterator[Seen]:
    width, scheme = request.param
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = Seen(page)
    page.on("request", lambda asked: found.requests.append(asked.url))
    page.on("console", lambda message: found.complaints.append(message.text))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.goto(report.as_uri())
    yield found
    page.close()


def test_nothing_is_asked_of_a_network_and_nothing_goes_wrong(seen: Seen) -> None:
    assert [url for url in seen.requests if not url.startswith("data:")] == [seen.page.url]
    assert seen.complaints == []


def test_every_picture_is_drawn_and_named(seen: Seen) -> None:
    images = seen.page.locator("img").all()
    assert len(images) >= 6
    for image in images:
        image.scroll_into_view_if_needed()
        assert image.evaluate("image => image.complete && image.naturalWidth") > 20
        assert str(image.get_attribute("alt")).startswith(("Input of row", "Rendered answer"))
    charts = seen.page.locator("figure[role=img] svg").all()
    assert len(charts) == 4
    for chart in charts:
        box = chart.bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 100


def test_the_headline_is_seen_first_with_its_values_and_its_drawing(seen: Seen) -> None:
    table = seen.page.locator("table.headline")
    box = table.bounding_box()
    assert box is not None
    assert box["y"] < 900
    rows = table.locator("tbody tr").all()
    assert [row.locator("th").inner_text().split("\n")[0] for row in rows] == [
        "Loss",
        "Character error rate",
        "Exact match",
        "Exact match, normalized",
        "Token edit distance",
        "BLEU",
        "Render match",
    ]
    for row in rows:
        assert all(cell.is_visible() for cell in row.locator("td").all())
        assert row.locator("circle.now").is_visible()


def test_nothing_is_wider_than_the_window(seen: Seen) -> None:
    for details in seen.page.locator("details:not([open]) summary").all():
        details.click()
    size = seen.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert size[0] <= size[1]


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_text_neither_runs_nor_loads_nor_breaks_the_page(
    chromium: "Browser", tmp_path: Path, width: int
) -> None:
    path = tmp_path / "report.html"
    endless = [prediction(HOSTILE, "x" * 2_000, "x" * 1_500 + "y" * 900)]
    made = replace(
        results([prediction("x" * 300, HOSTILE, HOSTILE), *endless]),
        name="x" * 300,
        inputs={"model": {"uri": HOSTILE + "x" * 300, "digest": HOSTILE}},
        versions={HOSTILE: "x" * 300},
        rejects=[{"id": "x" * 300, "reason": HOSTILE + "x" * 300}],
    )
    path.write_text(render(made), encoding="utf-8")
    page = chromium.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: asked.append(dialog.message))
    page.goto(path.as_uri())
    for details in page.locator("details:not([open]) summary").all():
        details.click()
    assert [url for url in asked if not url.startswith("data:")] == [page.url]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["text", "json", "label", "conversations"])
def test_a_page_of_any_task_fits_its_window_and_can_be_read(
    chromium: "Browser", tmp_path: Path, kind: str, width: int, scheme: Literal["light", "dark"]
) -> None:
    chats = kind == "conversations"
    found = of_task("text" if chats else kind, conversations=chats)  # type: ignore[arg-type]
    path = tmp_path / "report.html"
    path.write_text(render(found), encoding="utf-8")
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for image in page.locator(".cards img").all():
        image.scroll_into_view_if_needed()
        assert image.evaluate("image => image.complete && image.naturalWidth") > 20
    for name in (".tag", ".asked dd", ".confusion .right span", ".confusion .wrong span", "q"):
        for element in page.locator(name).all()[:1]:
            assert element.evaluate(CONTRAST) >= 4.5, name
    page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_of_many_runs_fits_its_window_and_can_be_read(
    chromium: "Browser", comparison: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(comparison.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [page.url]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.locator(".cards img").all()
    assert len(images) == 3
    for image in images:
        image.scroll_into_view_if_needed()
        assert image.evaluate("image => image.complete && image.naturalWidth") > 20
    for chart in page.locator("figure[role=img] svg").all():
        box = chart.bounding_box()
        assert box is not None
        assert box["width"] > 350
    letters = page.locator(".runs .letter").all()
    assert len(letters) == 9
    elements = [*letters, *(page.locator(name).first for name in COMPARED)]
    for element in elements:
        assert element.evaluate(CONTRAST) >= 4.5, element.inner_text()
    page.close()


def test_text_stands_out_from_what_is_behind_it(seen: Seen) -> None:
    """The contrast of WCAG's level AA, 4.5 to 1, for every kind of text on the page."""
    for name in (
        ".lead",
        ".aside",
        "td.was",
        "small",
        ".tag.bad",
        "ins",
        "del",
        "nav a",
        "summary",
    ):
        for element in seen.page.locator(name).all()[:1]:
            assert element.evaluate(CONTRAST) >= 4.5, name


def test_a_picture_of_the_page_holds_paper_and_ink(seen: Seen, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "page.png"
    browser.picture(seen.page, path)
    with Image.open(path) as image:
        histogram = image.convert("L").histogram()
        assert image.height > 1_500
    assert sum(histogram[:60]) > 1_000
    assert sum(histogram[200:]) > 1_000


CONTRAST = """
element => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  let paper, at = element;
  do {
    paper = parse(getComputedStyle(at).backgroundColor);
    at = at.parentElement;
  } while (at && paper.length === 4 && paper[3] === 0);
  const light = rgb => rgb.slice(0, 3)
    .map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ink = parse(getComputedStyle(element).color);
  const [a, b] = [light(paper), light(ink)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}
"""

"""Figures and claims of the pages are those of benchmarks/results/, or the test fails."""

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import ROOT
from tests.unit.project.test_docs import DOCS, PAGES, name_of, text

RESULTS = {path.name: path for path in (ROOT / "benchmarks" / "results").glob("*.json")}
README = ROOT / "README.md"
SUPPORT, SPEED, RECEIPTS = (
    DOCS / name for name in ("17-support.md", "18-speed.md", "19-receipts.md")
)
GPU = r"H100|H200|A100|B200|L40S|MI\d{3}[AX]?"
FIGURE = re.compile(
    r"\**(?P<number>\d[\d,]*(?:\.(?P<decimals>\d+))?) ?(?P<unit>%|s|ms|GiB)?\**(?:, .*)?"
)
"""A cell of a table that is a figure, perhaps with its unit and a remark."""


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS[name].read_text(encoding="utf-8"))
    return found


def sections(page: Path) -> Iterator[tuple[str, str]]:
    """Each heading of a page with the text below it, up to the next."""
    parts = re.split(r"^#{1,3} (.+)$", text(page), flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def cells(section: str) -> list[str]:
    """The cells of a section's tables, without the first column, which names rows."""
    rows = re.findall(r"^\|(?!-)(.+)\|$", section, re.MULTILINE)
    return [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)[1:]]


def named(section: str) -> list[str]:
    """The result files that a section names."""
    return [name for name in dict.fromkeys(re.findall(r"[\w-]+\.json", section)) if name in RESULTS]


def shown_in(figure: re.Match[str], values: list[float]) -> bool:
    """Whether one of the values, rounded as the figure is, is the figure."""
    number = float(figure["number"].replace(",", ""))
    half = 0.5 * 10 ** -len(figure["decimals"] or "") * (1 + 1e-6) + 1e-9
    scale = 100 if figure["unit"] == "%" else 1
    return any(abs(scale * value - number) <= half for value in values)


def every_number(name: str) -> list[float]:
    """All numbers of a result, in its keys and texts too."""
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", RESULTS[name].read_text())
    return [float(number) for number in numbers]


OTHER = {"Where a step's time goes", "The same on every device"}
"""Sections of docs/18 with sums of results, which another test compares, and with limits."""
MEASURED = [
    pytest.param(page, title, body, id=f"{page.name}: {title}")
    for page, titles in (
        (README, {"The result"}),
        (RECEIPTS, {"4. Run it", "5. The report"}),
        (SPEED, {title for title, _ in sections(SPEED)} - OTHER),
    )
    for title, body in sections(page)
    if title in titles and any(FIGURE.fullmatch(cell) for cell in cells(body))
]


def test_every_page_of_measurements_has_sections_that_are_checked() -> None:
    assert {param.values[0] for param in MEASURED} == {README, RECEIPTS, SPEED}
    assert len(MEASURED) >= 10


@pytest.mark.parametrize(("page", "title", "section"), MEASURED)
def test_the_figures_of_a_table_are_in_the_results_that_its_section_names(
    page: Path, title: str, section: str
) -> None:
    files = named(section)
    assert files, f"{page.name}, {title}: no file of benchmarks/results/ is named"
    values = [value for name in files for value in every_number(name)]
    figures = [match for cell in cells(section) if (match := FIGURE.fullmatch(cell))]
    assert [figure[0] for figure in figures if not shown_in(figure, values)] == []


def test_the_parts_of_a_step_add_up_to_its_time_on_the_device() -> None:
    body = dict(sections(SPEED))["Where a step's time goes"]
    parts = [int(ms) for ms in re.findall(r"^\| (\d+) \|", body, re.MULTILINE)]
    assert sum(parts) == round(read("profile-28b-h200.json")["device_ms"])


def job() -> dict[str, Any]:
    """The reference job on an H200."""
    return read("reference-job-28b-h200.json")


def peak_gib() -> float:
    return float(job()["summaries"]["train"]["peak_memory_bytes"] / 2**30)


def exported(key: str) -> Any:
    """What the checks of the README's export found."""
    return read("job-latex-cpu.json")["export"][key]


def reloaded(key: str) -> float:
    return float(exported("merged_reloaded")[key])


def trained(key: str) -> float:
    return float(job()["training"][key])


def counted(key: str) -> float:
    """What `run.json` says of the reference job's training."""
    return float(job()["summaries"]["train"][key])


def ways() -> dict[str, Any]:
    """The variants of a step on an H200."""
    found: dict[str, Any] = read("training-28b-h200.json")["ways"]
    return found


def fastest(way: str) -> float:
    return float(ways()[way]["fastest"] / ways()["transformers"]["fastest"])


def compiled() -> float:
    """How many times as fast a step is with `torch.compile`."""
    after, before = (ways()[way] for way in ("+ torch.compile", "+ adapters in bf16"))
    return float(after["tokens_per_second"] / before["tokens_per_second"])


def farthest_off() -> float:
    """Percent by which an estimate of memory was off, rounded up."""
    return math.ceil((read("memory-28b-h200.json")["farthest_off"] - 1) * 100)


WORDS = {"six": 6, "nine": 9}

HOW = DOCS / "01-how-it-works.md"
PLAN = DOCS / "15-plan.md"


def matches(name: str) -> float:
    """Mean exact matches of a way to continue an adapter, in percent."""
    return 100 * float(read("reinforcement.json")["mean_exact_match"][name])


CLAIMS: list[tuple[Path, str, Callable[[], float]]] = [
    (README, r"([\d.]+) minutes on two idle cores", lambda: read("job-latex-cpu.json")["minutes"]),
    (README, r"(\d+)\s+seconds of CPU time", lambda: read("job-latex-cpu.json")["cpu_seconds"]),
    (
        DOCS / "06-kubernetes-amd.md",
        r"about (\w+) minutes on two idle cores",
        lambda: round(read("job-latex-cpu.json")["minutes"]),
    ),
    (README, r"and ([\d.]+) GiB of memory", lambda: read("job-latex-cpu.json")["peak_gib"]),
    (README, r"of (\d+) tensors bit-identical", lambda: exported("tensors_checked")),
    (README, r"of (\d+) adapted ones", lambda: exported("changed_tensors")),
    (README, r"within ([\d.]+)% of the trained", lambda: 100 * reloaded("relative_rms")),
    (README, r"(\d) of 4\s+greedy answers", lambda: reloaded("same_answers")),
    (README, r"([\d.]+) GiB at\s+the peak on an H200", peak_gib),
    (README, r"([\d.]+) GiB of weights", lambda: job()["base_gib"]),
    (README, r"60 steps take (\w+) of them", lambda: trained("loop_seconds")),
    (README, r"(\d+) seconds on one H200", lambda: job()["total_seconds"]),
    (README, r"within (\d+)% of\s+seven measured peaks", farthest_off),
    (SPEED, r"(\d+) seconds\*\* from start", lambda: job()["total_seconds"]),
    (SPEED, r"60 steps (?:take|alone took) ([\d.]+) s", lambda: trained("loop_seconds")),
    (SPEED, r"`run\.json` says ([\d.]+) s", lambda: counted("seconds")),
    (SPEED, r"s and ([\d,]+) tokens a second", lambda: counted("tokens_per_second")),
    (SPEED, r"for ([\d,]+) tokens", lambda: counted("tokens")),
    (SPEED, r"tokens, ([\d,]+) a second", lambda: counted("tokens") / trained("loop_seconds")),
    (SPEED, r"says ([\d,]+) tokens a second", lambda: trained("steady_tokens_per_second")),
    (SPEED, r"on two cores \((\d+) s\)", lambda: read("parity-cpu.json")["seconds"]),
    (SPEED, r"GPU in training\s+([\d.]+) GiB", peak_gib),
    (SPEED, r"adapter had ([\d.]+) million", lambda: job()["work"]["trainable"] / 1e6),
    (SPEED, r"that is (\d+) times Transformers' best", lambda: fastest("train stage")),
    (RECEIPTS, r"(\d+) seconds of CPU time", lambda: read("job-receipts-cpu.json")["cpu_seconds"]),
    (RECEIPTS, r"([\d.]+) GiB of memory", lambda: read("job-receipts-cpu.json")["peak_gib"]),
    (PLAN, r"each estimated within (\d+)%", farthest_off),
    (PLAN, r"92 rows took (\d+) GiB", lambda: ways()["train stage"]["peak_gib"]),
    (
        DOCS / "26-reinforcement.md",
        r"takes ([\d.]+) seconds packed",
        lambda: read("answer-passes.json")["seconds"]["packed"],
    ),
    (
        DOCS / "26-reinforcement.md",
        r"generate ([\d,]+) tokens a second",
        lambda: read("reinforcement-28b-h200.json")["summaries"]["reinforce"][
            "generated_tokens_per_second"
        ],
    ),
    *(
        (DOCS / "26-reinforcement.md", rf"\| {row} \| ([\d.]+)%", partial(matches, name))
        for row, name in (
            ("after training", "trained"),
            ("trained on", "continued"),
            ("reinforced", "reinforced"),
        )
    ),
    (HOW, r"64 rows was ([\d.]+) times as fast", compiled),
    (
        HOW,
        r"first step took (\d+) seconds",
        lambda: ways()["+ torch.compile"]["first_step_seconds"],
    ),
]


@pytest.mark.parametrize(
    ("page", "pattern", "value"), CLAIMS, ids=[f"{p.name}: {c}" for p, c, _ in CLAIMS]
)
def test_a_figure_in_a_sentence_is_that_of_the_results(
    page: Path, pattern: str, value: Callable[[], float]
) -> None:
    claims = re.findall(pattern, text(page))
    assert claims, "the sentence has changed: change its entry too"
    for claim in claims:
        number = WORDS.get(claim) or float(claim.replace(",", ""))
        decimals = len(claim.partition(".")[2])
        assert round(value(), decimals) == number


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_of)
def test_a_gpu_on_which_a_page_says_that_something_ran_has_a_result(page: Path) -> None:
    devices = " ".join(str(read(name).get("device")) for name in RESULTS)
    prose = re.sub(r"```.*?```|`[^`]*`", "", text(page), flags=re.DOTALL)
    ran_on = rf"\b(?:on|one|of)\s+(?:an?|one|the|two|\d+)?\s*(?:NVIDIA\s+|AMD\s+)?({GPU})\b"
    assert [gpu for gpu in re.findall(ran_on, prose) if gpu not in devices] == []


def test_what_the_readme_says_to_have_run_on_a_gpu_names_the_gpu_and_its_result() -> None:
    claims = [
        clause
        for _, body in sections(README)
        for cell in cells(body)
        for clause in cell.split(";")
        if re.search(r"\brun on\b", clause) and "not run yet" not in clause
    ]
    assert len(claims) >= 2
    for claim in claims:
        [file] = named(claim)
        [gpu] = re.findall(GPU, claim)
        assert gpu in read(file)["device"], claim


def test_what_no_result_shows_is_not_said_to_have_run() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \| (.+) \| (.+) \|$", text(SUPPORT), re.MULTILINE)
    state = {name: (nvidia, amd) for name, _, nvidia, amd in rows}
    assert state
    assert not [name for name, (_, amd) in state.items() if re.match(r"\[(ran on|tested)", amd)]
    complete = {
        run
        for result in map(read, RESULTS)
        if re.search(GPU, str(result.get("device")))
        for run, measured in result.get("runs", {}).items()
        if measured.get("complete")
    }
    several = {name: said for name, (said, _) in state.items() if name.startswith("several")}
    assert len(several) == 2
    for name, said in several.items():
        of_all_weights = "`lora.method: full`" in name
        has_run = any(
            ("all weights" in run) == of_all_weights for run in complete if run[:2] != "1 "
        )
        assert said.startswith("[ran on" if has_run else "not run"), name


@pytest.mark.parametrize("page", [SUPPORT, README, SPEED], ids=name_of)
def test_a_page_tells_the_torch_of_the_gpu_results_and_that_of_the_lock(page: Path) -> None:
    measured = {
        version.rpartition(".")[0]
        for result in map(read, RESULTS)
        if re.search(GPU, str(result.get("device")))
        and (version := result.get("versions", {}).get("torch"))
    }
    [locked] = re.findall(r"^torch==(\d+\.\d+)", text(ROOT / "requirements/torch.txt"), re.M)
    said = re.findall(r"torch (\d+\.\d+)[;,\s]+(?:as .*?; )?the lock has (\d+\.\d+)", text(page))
    assert set(said) == {(version, locked) for version in measured}

"""What docs/17 claims is what tests and committed results show, and no page disagrees."""

import ast
import json
import re
from pathlib import Path

import pytest

from docs import support
from tests.jobs import ROOT
from tests.unit.project.test_docs import PAGES, text

TABLES = support.declared()["tables"]
DEVICES = {
    row["what"] if isinstance(row["what"], str) else row["what"]["en"]: row
    for row in TABLES["devices"]["rows"]
}


@pytest.mark.parametrize(
    "language", [name for name, page in support.PAGES.items() if page.is_file()]
)
def test_the_tables_are_what_make_support_writes(language: str) -> None:
    written = text(support.PAGES[language])
    assert support.page(language, written) == written


def test_every_test_that_is_named_as_evidence_exists() -> None:
    def functions(file: str) -> set[str]:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    named = support.tests(TABLES)
    assert len(named) > 30
    for test in named:
        file, _, name = test.partition("::")
        assert name.startswith("test_"), test
        assert name in functions(file), test


def test_what_ran_on_a_gpu_names_a_result_of_one_and_a_cell_without_evidence_says_not_run() -> None:
    for row in DEVICES.values():
        for column, cell in enumerate(row["cells"], start=1):
            if column in support.PARITY and "result" in cell:
                vendor = {"cuda": "NVIDIA", "rocm": "AMD"}[support.PARITY[column]]
                assert vendor in support.device(cell["result"]), (row["what"], column)
            assert column not in support.PARITY or "test" not in cell, "no test runs on a GPU here"


def test_a_parity_result_fills_the_cells_of_its_device(tmp_path: Path) -> None:
    assert support.parity_device("rocm", "train", tmp_path) is None
    found = {"device": "AMD Instinct MI300X", "ran": ["train"]}
    (tmp_path / "parity-rocm.json").write_text(json.dumps(found))
    assert support.parity_device("rocm", "train", tmp_path) == "AMD Instinct MI300X"
    assert support.parity_device("rocm", "captured passes", tmp_path) is None


def test_no_page_claims_what_a_cell_says_was_not_run() -> None:
    claims = support.declared()["claims"]
    for claim in claims:
        row, column = DEVICES[claim["row"]], claim["column"]
        shown = support.Writer(language="en", states=support.declared()["states"]).cell(
            row, row["cells"][column - 1], support.PARITY[column]
        )
        if not shown.startswith("not run"):
            continue
        for page in PAGES:
            prose = " ".join(text(page).split())
            assert re.search(claim["says"], prose) is None, (page, claim["row"])


def test_the_claims_that_are_looked_for_are_found_where_they_stand() -> None:
    sentences = ("DDP ran on two GPUs", "the 28B model was trained on an MI300X")
    for claim, sentence in zip(support.declared()["claims"], sentences, strict=True):
        assert re.search(claim["says"], sentence), sentence

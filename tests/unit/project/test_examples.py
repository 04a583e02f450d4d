"""The specs in specs/examples: each is valid, plain, and shows what its name says."""

from pathlib import Path

import pytest

from job import planning
from job.spec import keys
from job.spec.load import LoadedSpec, load_spec
from tests.jobs import ROOT

EXAMPLES = sorted((ROOT / "specs" / "examples").glob("*.yaml"))
each = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
BUILTIN = [path for path in EXAMPLES if "builtin://formulas" in path.read_text(encoding="utf-8")]


def load(path: Path, *overrides: str) -> LoadedSpec:
    return load_spec(path.read_text(encoding="utf-8"), path.name, overrides, {})


@each
def test_an_example_is_valid_without_any_variable(path: Path) -> None:
    assert load(path).spec.name == path.stem


@each
def test_an_example_names_the_schema_to_editors_and_says_what_it_shows(path: Path) -> None:
    first, _, about, *rest = path.read_text(encoding="utf-8").splitlines()
    marker, _, schema = first.partition("$schema=")
    assert marker == "# yaml-language-server: "
    assert (path.parent / schema).resolve() == keys.SCHEMA_FILE.resolve()
    assert about.startswith("# ")
    assert about.endswith(".")
    assert len(rest) < 40
    assert max(map(len, (about, *rest))) <= 100


def test_every_section_of_a_spec_is_shown() -> None:
    set_in = {key for path in EXAMPLES for key in load(path).changed}
    sections = {key.rpartition(".")[0] for key, node in leaves() if "default" in node}
    shown = {key.rpartition(".")[0].replace("data.eval", "data.train") for key in set_in}
    # How formulas are drawn is the subject of the specs beside the examples.
    assert sections - {"data.train.formulas"} <= shown


def leaves() -> list[tuple[str, keys.Schema]]:
    every = [(".".join(map(str, path)), node) for path, node in keys.walk()]
    held_out = ("data.eval.", "data.validation.")  # with the keys of data.train
    return [(k, n) for k, n in every if "properties" not in n and not k.startswith(held_out)]


@pytest.mark.parametrize(
    "path",
    [p for p in BUILTIN if p.stem in ("routed-experts", "less-memory")],
    ids=lambda p: p.stem,
)
def test_an_example_can_be_planned(path: Path, tmp_path: Path) -> None:
    order = planning.PlanOptions(
        loaded=load(path, f"output.uri={tmp_path}", "data.train.limit=8"), accelerator="mi300x"
    )
    made = planning.make_plan(order)
    assert made.memory is not None
    assert [fit.fits for fit in made.memory.fits] == [True]
    assert made.data.tokens_a_row

"""Every spec that ships is valid, names the schema, and is what its comments claim."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from job.spec import keys
from job.spec.load import LoadedSpec, dump_resolved, load_spec
from job.spec.parse import decode, parse
from tests.jobs import ROOT

SPECS = sorted((Path(__file__).parents[3] / "specs").glob("*.y*ml"))
each_spec = pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)


def _load(name: str, *overrides: str, **environ: str) -> LoadedSpec:
    (path,) = (path for path in SPECS if path.stem == name)
    return load_spec(decode(path.read_bytes(), path.name), path.name, overrides, environ)


def test_the_specs_that_the_documentation_names_are_there() -> None:
    assert {"latex", "ernie-4.5-vl-28b-latex", "im2latex"} <= {path.stem for path in SPECS}


@each_spec
def test_is_valid_without_any_variable(path: Path) -> None:
    assert _load(path.stem).spec.version == 1


@each_spec
def test_resolved_loads_again_as_the_same_job(path: Path) -> None:
    loaded = _load(path.stem)
    again = load_spec(dump_resolved(loaded), "spec.resolved.yaml", environ={})
    assert again == loaded


@each_spec
def test_first_line_names_the_schema_to_editors(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    marker, _, schema = first.partition("$schema=")
    assert marker == "# yaml-language-server: "
    assert (path.parent / schema).resolve() == keys.SCHEMA_FILE.resolve()


@each_spec
def test_is_commented_and_fits_a_screen(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("#" in line for line in lines) >= 6


@each_spec
def test_says_nothing_that_is_not_a_key(path: Path) -> None:
    document = parse(path.read_text(encoding="utf-8"), path.name)
    unknown = [place for place in document.locations if place and keys.at(place) is None]
    assert unknown == []


def test_latex_needs_no_network_and_trains_what_it_does_not_evaluate() -> None:
    spec = _load("latex").spec
    assert spec.data.eval is not None
    uris = {spec.model.model_name_or_path, spec.data.train[0].uri, spec.data.eval.uri}
    assert uris == {"builtin://ernie-vl-tiny", "builtin://formulas"}
    assert spec.model.init == "pretrained"
    assert spec.data.train[0].formulas.seed != spec.data.eval.formulas.seed
    assert spec.data.train[0].formulas == replace(
        spec.data.eval.formulas, seed=spec.data.train[0].formulas.seed
    )
    assert spec.eval.max_samples >= 200


def test_latex_asks_for_another_typeface_than_the_base_was_trained_on() -> None:
    learned = _load("tiny-base").spec.data.train[0].formulas
    asked = _load("latex").spec.data.train[0].formulas
    assert asked.math_fontfamily != learned.math_fontfamily
    assert asked.font_size != learned.font_size
    assert (learned.noise, learned.rotation) == (0, 0)
    assert asked.noise > 0
    assert asked.rotation > 0


def test_latex_writes_where_output_says() -> None:
    assert _load("latex").spec.output.uri == "outputs/latex"
    assert _load("latex", OUTPUT="s3://b/x").spec.output.uri == "s3://b/x"
    assert _load("latex", "output.uri=/tmp/x", OUTPUT="s3://b/x").spec.output.uri == "/tmp/x"


def test_ernie_is_the_reference_workload() -> None:
    spec = _load("ernie-4.5-vl-28b-latex", BUCKET="b").spec
    assert spec.model.model_name_or_path == "hf://baidu/ERNIE-4.5-VL-28B-A3B-PT"
    assert (spec.model.dtype, spec.train.optim) == ("bfloat16", "adamw_8bit")
    assert (spec.lora.r, spec.lora.lora_alpha, spec.lora.finetune_experts) == (8, 16, True)
    assert spec.train.router_aux_loss_coef == 0
    assert spec.train.per_device_train_batch_size * spec.train.gradient_accumulation_steps == 4
    assert (spec.train.max_steps, spec.train.learning_rate) == (60, 2e-4)
    assert (spec.export.merged.enabled, spec.export.merged.dtype) == (True, "float16")
    assert spec.output.uri == "s3://b/ernie-4.5-vl-28b-latex"


def test_im2latex_reads_the_folder_that_its_variable_names() -> None:
    spec = _load("im2latex", IM2LATEX="s3://b/formulas").spec
    assert spec.data.eval is not None
    assert spec.data.train[0].uri == "s3://b/formulas/train.jsonl"
    assert spec.data.eval.uri == "s3://b/formulas/validation.jsonl"
    assert spec.data.eval.columns == spec.data.train[0].columns


@pytest.mark.parametrize(("given", "code"), [([], 2), (["--help"], 0), (["a", "many"], 2)])
def test_the_script_of_receipts_says_what_it_takes_and_draws_nothing(
    tmp_path: Path, given: list[str], code: int
) -> None:
    script = str(ROOT / "specs" / "receipts.py")
    done = subprocess.run(
        [sys.executable, script, *given], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert "usage:" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())

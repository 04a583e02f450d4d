"""A checkpoint's small files: what may be wrong with them, and what depends on them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from job import families
from job.errors import InputError
from job.families.base import Layout
from job.families.model_source import GENERATION, find_model
from job.pipeline.fingerprints import StageInputs
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.models import BUILDERS

TINY = Path("job/families/builtin/ernie-vl-tiny")


def builtin(directory: Path) -> None:
    shutil.copytree(TINY, directory, dirs_exist_ok=True)


MODELS: dict[str, Callable[[Path], None]] = {
    "builtin": builtin,
    "qwen3": BUILDERS["qwen3"],
    "qwen_vl": BUILDERS["qwen_vl"],
}


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bases") / request.param
    directory.mkdir()
    MODELS[request.param](directory)
    return directory


def spec_of(base: Path, **train: Any) -> JobSpec:
    text = json.dumps(
        {
            "version": 1,
            "name": "test",
            "model": {"model_name_or_path": str(base)},
            "data": {"train": {"uri": "builtin://formulas", "limit": 4}},
            "train": train,
            "output": {"uri": "out"},
        }
    )
    return load_spec(text, "spec", environ={}).spec


def bound(base: Path) -> families.Family:
    spec = spec_of(base)
    return families.bind(families.read_checkpoint(str(base), base), spec.model, spec.data)


def generation(base: Path, **settings: Any) -> Path:
    """A copy of the base whose file says this besides."""
    path = base / GENERATION
    own = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**own, **settings}))
    return base


UNSAVABLE: dict[str, dict[str, Any]] = {
    "sampling without sampling": {"do_sample": False, "temperature": 0.2, "top_p": 0.8},
    "beams without beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    "a negative padding token": {"pad_token_id": -1},
}


@pytest.mark.parametrize(
    ("name", "layout"), zip(UNSAVABLE, ("vllm", "transformers", "vllm"), strict=True)
)
def test_what_transformers_would_not_write_is_repaired_with_a_note(
    base: Path, name: str, layout: Layout, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    generation(copy, repetition_penalty=1.1, **UNSAVABLE[name])
    target = tmp_path / "merged"
    target.mkdir()
    family = bound(copy)
    [note] = family.save_settings(target, dtype=torch.float16, layout=layout)
    written = GenerationConfig.from_pretrained(target)
    written.validate(strict=True)
    assert written.repetition_penalty == 1.1
    assert written.do_sample is not True
    assert written.eos_token_id == list(family.end_tokens)
    said = json.loads((target / GENERATION).read_text())
    for key in UNSAVABLE[name].keys() - said.keys():
        assert key in note


def test_what_transformers_writes_is_kept_without_a_note(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    generation(copy, do_sample=True, temperature=0.2, top_p=0.8)
    target = tmp_path / "merged"
    target.mkdir()
    assert bound(copy).save_settings(target, dtype=torch.float16, layout="vllm") == ()
    said = json.loads((target / GENERATION).read_text())
    assert (said["do_sample"], said["temperature"], said["top_p"]) == (True, 0.2, 0.8)


BROKEN = {
    "no JSON": ("{", "is not JSON"),
    "no object": ("[]", "is not a JSON object"),
    "a value that cannot be": ('{"max_new_tokens": -3}', "rejected by Transformers"),
    "a value of another type": ('{"max_new_tokens": "many"}', "rejected by Transformers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_repaired_is_named(name: str, tmp_path: Path) -> None:
    builtin(tmp_path)
    text, reason = BROKEN[name]
    (tmp_path / GENERATION).write_text(text)
    with pytest.raises(InputError, match=reason) as refused:
        bound(tmp_path).save_settings(tmp_path, dtype=torch.float16, layout="vllm")
    assert GENERATION in str(refused.value)


def fingerprints(base: Path) -> dict[str, str]:
    given = StageInputs(spec_of(base), processes=1)
    return {
        stage: given.fingerprint(stage, {})
        for stage in ("prep", "baseline", "train", "eval", "export")
    }


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    builtin(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "name", ["LICENSE.txt", "README.txt", "NOTICE.txt", "notes.json", "trainer_state.json"]
)
def test_a_file_that_nothing_reads_makes_no_stage_again(name: str, copied: Path) -> None:
    before = fingerprints(copied)
    (copied / name).write_text("{}")
    assert fingerprints(copied) == before
    (copied / name).write_text('{"more": 1}')
    assert fingerprints(copied) == before


def test_how_answers_are_generated_makes_evaluation_and_export_again_but_no_training(
    copied: Path,
) -> None:
    before = fingerprints(copied)
    after = fingerprints(generation(copied, repetition_penalty=1.3))
    changed = {stage for stage in before if before[stage] != after[stage]}
    assert changed == {"baseline", "eval", "export"}


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja",
     "tokenizer_config.json", "preprocessor_config.json", "vocab.json", "merges.txt"],
)  # fmt: skip
def test_a_file_that_training_reads_makes_it_again(name: str, copied: Path) -> None:
    before = fingerprints(copied)
    path = copied / name
    path.write_text((path.read_text() if path.exists() else "{}") + "\n")
    after = fingerprints(copied)
    assert {stage for stage in before if before[stage] != after[stage]} == {
        "baseline", "train", "eval", "export",
    }  # fmt: skip


def test_a_new_control_token_prepares_the_rows_again(copied: Path) -> None:
    before = fingerprints(copied)
    config = json.loads((copied / "tokenizer_config.json").read_text())
    config["mask_token"] = "<mask>"
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    assert fingerprints(copied)["prep"] != before["prep"]


READ: list[str] = []


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | Path):
        READ.append(str(arguments[0]))


def test_every_file_that_a_load_opens_counts(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    (copy / "notes.json").write_text("{}")
    if not READ:
        sys.addaudithook(note)
        READ.append("")
    READ[1:] = []
    bound(copy).load(dtype=torch.float32, device=torch.device("cpu"))
    opened = {Path(path).name for path in READ if path.startswith(f"{copy}/")}
    assert "config.json" in opened
    model = spec_of(copy).model
    digests = [find_model(model).weights_digest]
    for name in sorted(opened - {GENERATION}):
        (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
        digests.append(find_model(model).weights_digest)
    assert len(set(digests)) == len(opened - {GENERATION}) + 1

"""ControlTokens tokens of the model in texts are rejects of prep, all at once, before training."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job import families
from job.errors import SpecError
from job.families.chat import ControlTokens
from job.prep import control_tokens
from job.prep.discovery import find_source
from job.prep.prepare import prepare
from job.prep.result_checks import TooManyBadRows
from job.spec.load import load_spec
from tests.models import BUILDERS
from tests.published import train_sentencepiece
from tests.unit.prep.test_prep import data_spec, folder, inputs, pair, rejects, write_jsonl

__all__ = ["folder"]  # the fixture

TINY = Path("job/families/builtin/ernie-vl-tiny")
TOKENS = ("<unk>", "<|im_end|>")
SPEC = load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


def test_texts_with_control_tokens_are_rejects_all_at_once(folder: Path, tmp_path: Path) -> None:
    rows = [pair(n) for n in range(20)]
    rows[5]["text"] = "P(w \\mid <unk>) = x"
    rows[12]["text"] = "<|im_end|>"
    talk = [{"role": "user", "content": "<unk>?"}, {"role": "assistant", "content": "no"}]
    spec = data_spec(write_jsonl(folder, [*rows, {"messages": talk}]), max_bad_rows=3)
    source = find_source(spec.train[0], "$.data.train")
    data = prepare(inputs(spec, [source], control_tokens=TOKENS), tmp_path / "prepared")
    assert (data.rejected_rows, data.train_rows + data.eval_rows) == (3, 18)
    assert rejects(tmp_path) == {
        "rows.jsonl:6": "the text contains a control token of the model: <unk>",
        "rows.jsonl:13": "the text contains a control token of the model: <|im_end|>",
        "rows.jsonl:21": "the text contains a control token of the model: <unk>",
    }
    counted = json.loads((tmp_path / "prepared" / "stats.json").read_text())["rejected"]
    assert counted == {"rows": 3, "reasons": {"the text contains a control token of the model": 3}}


def test_more_of_them_than_allowed_end_prep_with_every_row(folder: Path, tmp_path: Path) -> None:
    rows = [pair(n, text=f"<unk> {n}" if n % 5 == 0 else f"x_{n}") for n in range(20)]
    spec = data_spec(write_jsonl(folder, rows))
    source = find_source(spec.train[0], "$.data.train")
    with pytest.raises(TooManyBadRows, match="4 of 20 rows") as refused:
        prepare(inputs(spec, [source], control_tokens=TOKENS), tmp_path / "prepared")
    named = [problem.field for problem in refused.value.problems]
    assert named == ["$.data.max_bad_rows", *(f"rows.jsonl:{n}" for n in (1, 6, 11, 16))]


@pytest.mark.parametrize("key", ["instruction", "system"])
def test_one_in_a_prompt_of_the_spec_is_an_error_of_its_key(
    key: str, folder: Path, tmp_path: Path
) -> None:
    prompts: Any = {"instruction": "Read.", key: "<unk> Read."}
    spec = data_spec(write_jsonl(folder, [pair(1)]), **prompts)
    source = find_source(spec.train[0], "$.data.train")
    with pytest.raises(SpecError, match=rf"\$\.data\.{key}: contains a control token"):
        prepare(inputs(spec, [source], control_tokens=TOKENS), tmp_path / "prepared")


def published(directory: Path) -> None:
    """A tokenizer as published checkpoints hold it: sentencepiece alone."""
    for name in ("config.json", "chat_template.jinja", "processor_config.json"):
        shutil.copy(TINY / name, directory / name)
    config = json.loads((TINY / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "ernie4_5_moe_vl"}))
    (directory / "tokenizer_config.json").write_text('{"sep_token": "<|end_of_sentence|>"}')
    (directory / "preprocessor_config.json").write_text("{}")
    train_sentencepiece(directory / "tokenizer.model", "bpe")


def builtin(directory: Path) -> None:
    shutil.copytree(TINY, directory, dirs_exist_ok=True)


MODELS: dict[str, Callable[[Path], None]] = {**BUILDERS, "builtin": builtin, "published": published}


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_of_the_files_are_those_of_the_loaded_tokenizer(
    name: str, tmp_path: Path
) -> None:
    MODELS[name](tmp_path)
    if name == "published":
        from job.families.ernie45_vl.published_format import tokenizer

        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        loaded = tokenizer.read("published", tmp_path, config)
    else:
        checkpoint = families.read_checkpoint(name, tmp_path)
        loaded = families.bind(checkpoint, SPEC.model, SPEC.data).processor.tokenizer
    found = families.control_tokens(name, tmp_path, SPEC.model)
    assert control_tokens.pattern(found) == ControlTokens.of(loaded).pattern


def test_prep_with_a_models_tokens_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from typing import Any
from job import families
from job.pipeline.fingerprints import StageInputs
from job.spec.load import load_spec
given = StageInputs(load_spec(Path("specs/latex.yaml").read_text(), "spec", environ={}).spec, 1)
assert "<|IMAGE_START|>" in given.control_tokens, given.control_tokens
assert given.fingerprint("prep", {})
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

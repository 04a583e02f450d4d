"""The spec's chat template and system prompt, from the first check to the exported model."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from job.cli.app import app
from job.errors import DataError, JobError, SpecError
from job.pipeline.context import RunContext
from job.train import adapting
from tests.jobs import job, read_json, sets, small_run
from tests.unit.families.test_packed_step import TINY

TEMPLATE = (TINY / "chat_template.jinja").read_text().replace("'User: '", "'Question: '")
DROPS = TEMPLATE.replace(
    "{%- for message in messages -%}",
    "{%- for message in messages if message.role != 'system' -%}",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def refused(kind: type[JobError], output: Path, cache: Path, **settings: object) -> JobError:
    with pytest.raises(kind) as caught:
        app(small_run(str(output), *sets(settings), cache=cache), standalone_mode=False)
    return caught.value


def test_what_a_spec_alone_gets_wrong_is_told_before_rows_are_prepared(
    tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(DROPS)
    settings = {"model.chat_template": path, "data.system": "Be brief."}
    error = refused(SpecError, tmp_path / "out", cache, **settings)
    assert error.problems[0].field == "$.data.system"
    path.write_text(TEMPLATE.replace("<|IMAGE_PLACEHOLDER|>", ""))
    error = refused(SpecError, tmp_path / "out", cache, **settings)
    assert "shows 0 of 2 images" in error.problems[0].message
    vision = {"lora.target_modules": "[q_proj]", "train.vision_tower_lr": 1e-4}
    error = refused(SpecError, tmp_path / "out", cache, **vision)
    assert "selects nothing in the vision tower" in error.problems[0].message
    assert not (tmp_path / "out" / ".stages").exists()
    path.write_text("{% if %}")
    with pytest.raises(SpecError, match="no Jinja template: line 1"):
        app(["validate", "specs/latex.yaml", *sets(settings)], standalone_mode=False)


def test_a_spec_that_does_not_fit_the_model_is_refused_before_the_output_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole, prepared = tmp_path / "out", adapting.require, threading.Event()
    vision = {"lora.target_modules": "[q_proj]", "train.vision_tower_lr": 1e-4}

    def late(*given: Any) -> None:
        assert prepared.wait(60)
        whole(*given)

    def prep_ends(self: RunContext, *, wait: bool = True) -> None:
        if wait:
            prepared.set()
        require_checked_model(self, wait=wait)

    require_checked_model = RunContext.require_checked_model
    with monkeypatch.context() as patch:  # as if the check took longer than prep
        patch.setattr(adapting, "require", late)
        patch.setattr(RunContext, "require_checked_model", prep_ends)
        refused(SpecError, output, cache, **vision)
    assert not (output / "data").exists()
    assert job("prep", *small_run(str(output), cache=cache)[1:]).code == 0
    files = [output / ".stages" / "prep.json", output / "spec.resolved.yaml"]
    before = [path.read_bytes() for path in files]
    refused(SpecError, output, cache, **vision, **{"data.train.limit": 7})
    assert [path.read_bytes() for path in files] == before


def test_what_is_wrong_with_the_spec_is_said_before_what_is_wrong_with_the_rows(
    tmp_path: Path, cache: Path
) -> None:
    rows = [{"image": f"{number}.png", "text": "x"} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"uri": str(tmp_path / "rows.jsonl")}, "eval_fraction": 0.3}
    settings = {"data": json.dumps(data), "data.train.limit": 6, "data.eval": "null"}
    refused(DataError, tmp_path / "rows", cache, **settings)
    error = refused(
        SpecError, tmp_path / "out", cache, **settings, **{"lora.target_modules": "[nothing]"}
    )
    assert error.problems[0].field == "$.lora.target_modules"
    assert not (tmp_path / "out" / "data").exists()


def test_a_row_that_the_template_does_not_fit_is_told_before_the_baseline(
    tmp_path: Path, cache: Path
) -> None:
    turns = [("system", "Be brief."), ("user", "1?"), ("assistant", "one")]
    rows = [
        {"messages": [{"role": role, "content": f"{text}{n}"} for role, text in turns]}
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"uri": str(tmp_path / "rows.jsonl")}, "text_only": True, "eval_fraction": 0.3}
    (tmp_path / "chat.jinja").write_text(DROPS)
    error = refused(
        DataError, tmp_path / "out", cache,
        **{"data": json.dumps(data), "data.train.limit": 12, "data.eval": "null",
           "model.chat_template": tmp_path / "chat.jinja"},
    )  # fmt: skip
    assert "does not show the system prompt" in error.problems[0].message
    assert error.problems[0].field.startswith("rows.jsonl:")
    assert not (tmp_path / "out" / ".stages" / "baseline.json").exists()


@pytest.mark.slow
def test_a_whole_job_trains_asks_and_exports_by_both(tmp_path: Path, cache: Path) -> None:
    path, output = tmp_path / "chat.jinja", tmp_path / "out"
    path.write_text(TEMPLATE)
    settings = sets({"model.chat_template": path, "data.system": "Be brief."})
    done = job(*small_run(str(output), *settings, cache=cache))
    assert done.code == 0, done.err
    assert 'requests to the served model need the system prompt of training system="Be' in done.err
    marked = read_json(output / "train" / "label_proof.json")["marked"]
    assert "Be brief.\nQuestion: " in marked
    assert (output / "adapter" / "chat_template.jinja").read_text() == TEMPLATE
    merged = (output / "merged" / "chat_template.jinja").read_text()
    assert merged == TEMPLATE.replace("<|IMAGE_PLACEHOLDER|>", "<|image@placeholder|>")
    assert read_json(output / "merged" / "export.json")["system"] == "Be brief."
    first = json.loads((output / "eval" / "predictions.jsonl").read_text().splitlines()[0])
    assert [each["role"] for each in first["asked"]] == ["system", "user"]
    cached = ["--set", f"runtime.cache_dir={cache}"]
    arguments = ["specs/latex.yaml", "--output", str(output), *cached, *settings]
    done = job("infer", *arguments, "--row", first["id"], "--weights", "merged")
    assert done.code == 0, done.err
    assert done.out.strip().endswith(first["label"])

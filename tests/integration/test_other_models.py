"""The whole job on other architectures, from the command line: one of each family."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from job.cli.app import app
from job.errors import DataError
from job.prep.formulas import render_latex
from tests.jobs import FORMULAS, SMALL, job, read_json, sets, sums
from tests.models import BUILDERS

TEXT, FORMULA = "specs/text.yaml", "specs/latex.yaml"
SPECS = {"qwen_vl": FORMULA, "idefics3": FORMULA, "qwen3": TEXT, "llama": TEXT}
AUTO = {FORMULA: "AutoModelForImageTextToText", TEXT: "AutoModelForCausalLM"}
FAST = ("qwen_vl", "qwen3")  # tied embeddings, and the harder template, of each family


@dataclass(frozen=True)
class Ran:
    kind: str
    output: Path
    arguments: tuple[str, ...]
    """The spec with its settings, for other commands."""
    err: str

    @property
    def spec(self) -> str:
        return SPECS[self.kind]


def here(*arguments: str) -> str:
    """What the command prints; runs in this process, so errors propagate."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None:
        raise done.exception
    return done.output


def picture(directory: Path) -> Path:
    drawn = render_latex("x^{2}")
    assert drawn is not None
    drawn.save(directory / "picture.png")
    return directory / "picture.png"


def conversations(directory: Path) -> Path:
    """Rows without images, in three shapes, many of them with a history."""
    rows: list[dict[str, Any]] = []
    for number in range(20):
        said = [{"role": "user", "content": f"What is {number} plus {number}?"}]
        answer = [{"role": "assistant", "content": f"It is {2 * number}."}]
        more = [{"role": "user", "content": "And one more?"}]
        last = [{"role": "assistant", "content": str(2 * number + 1)}]
        rows.append({"messages": [*said, *answer, *more, *last]})
        rows.append({"messages": [{"role": "system", "content": "Be short."}, *said, *answer]})
    directory.mkdir()
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(
    scope="module",
    params=[k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in BUILDERS],
)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    kind = str(request.param)
    place = tmp_path_factory.mktemp(kind)
    BUILDERS[kind](place / "model")
    settings: dict[str, object] = {
        **SMALL,
        "train.fit": "on",
        "train.learning_rate": 5e-3,
        "train.per_device_train_batch_size": 4,
        "train.gradient_checkpointing": "true",
        "model.model_name_or_path": place / "model",
        "model.init": "pretrained",
        "runtime.cache_dir": place / "cache",
    }
    if SPECS[kind] == TEXT:
        data = conversations(place / "data")
        settings |= {"data.train.uri": data / "train.jsonl", "data.eval_fraction": 0.2}
    else:
        settings |= {**FORMULAS, "train.max_length": 512, "export.merged.layout": "transformers"}
    arguments = (SPECS[kind], "--output", str(place / "out"), *sets(settings))
    done = job("run", *arguments)
    assert done.code == 0, done.err
    return Ran(kind, place / "out", arguments, done.err)


def test_the_whole_job_runs(ran: Ran) -> None:
    run = read_json(ran.output / "run.json")
    assert run["status"] == "succeeded"
    assert set(run["stages"]) == {"prep", "baseline", "train", "eval", "export", "card", "report"}
    for metrics in run["metrics"].values():
        assert {"loss", "cer", "exact_match", "bleu"} <= set(metrics)
    assert run["metrics"]["final"]["loss"] < run["metrics"]["baseline"]["loss"]
    assert "has no padding-free step" in ran.err
    assert sums(ran.output)


def test_the_label_proof_marks_answers_and_their_end(ran: Ran) -> None:
    proof = read_json(ran.output / "train/label_proof.json")
    trained = [piece["text"] for piece in proof["pieces"] if piece["trained"]]
    end = {"llama": "<|eot_id|>", "idefics3": "<end_of_utterance>"}.get(ran.kind, "<|im_end|>")
    assert trained
    for text in trained:
        assert text.endswith(end)
        assert text.count("<|") == (end != "<end_of_utterance>")


def test_the_proof_holds_adapter_and_merged_equal_to_what_was_trained(ran: Ran) -> None:
    proof = read_json(ran.output / "merged/export.json")
    assert proof["adapter_reloaded"]["relative_rms"] < 1e-4
    assert proof["merged_reloaded"]["relative_rms"] < 1e-2
    assert proof["tensors_checked"] == proof["tensors"]
    assert proof["changed_tensors"] == proof["adapted_tensors"] > 0
    assert proof["trained_against_base"]["relative_rms"] > proof["merged_reloaded"]["relative_rms"]


def test_merged_weights_are_those_of_from_pretrained_by_the_published_names(ran: Ran) -> None:
    import transformers

    auto = getattr(transformers, AUTO[ran.spec])
    merged, base = ran.output / "merged", ran.output.parent / "model"
    stored = safetensors.torch.load_file(merged / "model.safetensors")
    published = safetensors.torch.load_file(base / "model.safetensors")
    assert {k: t.shape for k, t in stored.items()} == {k: t.shape for k, t in published.items()}
    model, found = auto.from_pretrained(merged, output_loading_info=True, dtype=torch.float16)
    assert not any(found.values()), found
    assert model.config.tie_word_embeddings is (ran.kind in FAST)
    files = {path.name for path in base.iterdir()} - {"model.safetensors"}
    assert files <= {path.name for path in merged.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (merged / name).read_text() == (base / name).read_text()


def test_an_adapter_for_vllm_is_written_where_every_target_is_of_the_language_model(
    ran: Ran,
) -> None:
    there = (ran.output / "adapter-vllm/adapter_model.safetensors").is_file()
    assert there is (ran.spec == TEXT)


@pytest.mark.parametrize("weights", ["adapter", "merged"])
def test_infer_answers(ran: Ran, weights: str, tmp_path: Path) -> None:
    asked = ["--question", "What is 2 plus 2?"]
    if ran.spec == FORMULA:
        asked = ["--image", str(picture(tmp_path))]
    assert here("infer", *ran.arguments, *asked, "--weights", weights).endswith("\n")


def test_plan_and_validate_tell_family_targets_and_serving(ran: Ran) -> None:
    plan = here("plan", *ran.arguments)
    family = "llm" if ran.spec == TEXT else "vlm"
    served = {"llm": "as adapter-vllm/ beside the base", "vlm": "as merged/ only"}[family]
    assert re.search(rf"family +{family}, ", plan)
    assert "lora: language attention" in plan
    assert ("lora: connector" in plan) is (family == "vlm")
    assert re.search(rf"served +{served}", plan)
    assert re.search("batches +padded", plan)
    assert "with a GPU" in plan
    assert f"to be served {served}" in job("validate", *ran.arguments).err


def test_a_text_model_refuses_an_image(ran: Ran, tmp_path: Path) -> None:
    if ran.spec != TEXT:
        pytest.skip("the model reads images")
    with pytest.raises(DataError, match="but the model is text-only"):
        here("infer", *ran.arguments, "--image", str(picture(tmp_path)), "--question", "What?")

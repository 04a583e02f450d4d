"""The whole job by its command: what it leaves, what it skips, what it does again."""

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from job.families.model_source import MODELS
from job.prep import formulas
from job.spec.load import load_spec
from tests import held
from tests.jobs import FULL, job, read_json, sets, small_run, start, sums

STAGES = ("prep", "baseline", "train", "eval", "export", "card", "report")


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished output, for a test to change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def skipped(err: str) -> set[str]:
    return {stage for stage in STAGES if f"{stage}: complete, skipped" in err}


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    for path in (
        *(
            "run.json",
            "sbom.cdx.json",
            "spec.resolved.yaml",
            "report.html",
            "SHA256SUMS",
            "_SUCCESS",
        ),
        *("data/stats.json", "data/rejects.jsonl", "data/train-00000.arrow"),
        *("eval/baseline.json", "eval/final.json", "eval/predictions.jsonl"),
        *("train/label_proof.json", "train/history.jsonl"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md"),
        "merged/README.md",
        *("merged/config.json", "merged/model.safetensors", "merged/tokenizer.json"),
        *("merged/preprocessor_config.json", "merged/chat_template.jinja", "merged/export.json"),
        *("checkpoints/step-2/manifest.json", "checkpoints/step-4/manifest.json"),
    ):
        assert (finished / path).is_file(), path
    assert not list(finished.rglob("*.writing*"))
    listed = set(sums(finished))
    parts = {"data", "eval", "train", "adapter", "merged", "report.html"}
    assert {path.split("/")[0] for path in listed} == parts


def test_run_json_says_what_happened(finished: Path) -> None:
    run = read_json(finished / "run.json")
    assert run["status"] == "succeeded"
    assert set(run["stages"]) == set(STAGES)
    for metrics in run["metrics"].values():
        assert {"loss", "cer", "exact_match", "token_edit_distance", "bleu"} <= set(metrics)
    assert run["metrics"]["final"]["loss"] < run["metrics"]["baseline"]["loss"]
    rows = run["rows"]
    assert rows["train"] + rows["leaked"] == 24
    assert (rows["eval"], rows["rejected"], rows["dropped_over_max_length"]) == (6, 0, 0)
    assert run["throughput"]["tokens_per_second"] > 0
    assert 0 < run["throughput"]["data_wait_share"] < 1
    assert {"torch", "transformers", "peft", "python"} <= set(run["versions"])
    assert set(run["inputs"]) == {"model", "train", "eval"}


def test_the_loss_falls_and_every_step_is_recorded(finished: Path) -> None:
    lines = (finished / "train" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(entry["tokens_per_second"] > 0 for entry in history)
    assert all(0 < entry["data_wait_share"] < 1 for entry in history)


def test_lengths_of_the_training_rows_are_told(finished: Path) -> None:
    found = read_json(finished / "train" / "lengths.json")
    assert found["rows"] == sum(found["tokens_a_row"]["histogram"].values()) <= 24
    assert found["over_max_length"]["rows"] == 0 < found["tokens_a_row"]["median"]


def test_predictions_stand_beside_their_labels(finished: Path) -> None:
    lines = (finished / "eval" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 6
    assert all({"id", "label", "prediction", "score"} <= set(p) for p in predictions)
    assert len({p["label"] for p in predictions}) == 6


def test_the_export_is_proven(finished: Path) -> None:
    proof = read_json(finished / "merged" / "export.json")
    assert proof["adapter_reloaded"]["relative_rms"] < 1e-4
    assert proof["merged_reloaded"]["relative_rms"] < 1e-2
    assert proof["trained_against_base"]["relative_rms"] > 1e-2
    assert proof["changed_tensors"] == proof["adapted_tensors"] == 40
    assert proof["tensors_checked"] == proof["tensors"]


def test_the_commands_of_the_adapters_card_load_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (finished / "adapter" / "README.md").read_text(encoding="utf-8")
    [commands] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(finished)
    loaded: dict[str, Any] = {}
    exec(commands.replace('"BASE"', repr(str(MODELS / "ernie-vl-tiny"))), loaded)  # noqa: S102
    stored = safetensors.torch.load_file(finished / "adapter" / "adapter_model.safetensors")
    weights = loaded["model"].state_dict()
    assert stored
    for name, value in stored.items():
        stem, _, kind = name.rpartition(".")
        assert torch.equal(weights[f"{stem}.default.{kind}"], value), name
    assert loaded["processor"].tokenizer


def test_merged_weights_are_fp16_but_for_the_router_gates(finished: Path) -> None:
    merged = safetensors.torch.load_file(finished / "merged" / "model.safetensors")
    gates = {name for name in merged if ".gate.weight" in name or "moe_statics" in name}
    assert len(gates) == 3 * 3  # per sparse layer: two gates and their correction biases
    assert {merged[name].dtype for name in gates} == {torch.float32}
    assert {t.dtype for name, t in merged.items() if name not in gates} == {torch.float16}
    assert read_json(finished / "merged" / "config.json")["dtype"] == "float16"


def test_a_start_that_fails_leaves_a_finished_run_as_it_is(output: Path, cache: Path) -> None:
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert "_SUCCESS" in before
    done = job(*small_run(str(output), "--set", "model.model_name_or_path=/nowhere", cache=cache))
    assert done.code == 12, done.err
    assert "the finished run at the output is unchanged" in done.err
    assert {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()} == before


def test_a_second_run_skips_every_stage_and_changes_nothing(output: Path, cache: Path) -> None:
    before = sums(output)
    done = job(*small_run(str(output), cache=cache))
    assert done.code == 0, done.err
    # The output's URI is no part of a stage: the copy is as complete as the original.
    assert skipped(done.err) == set(STAGES)
    assert sums(output) == before
    # A model that learned next to nothing does not look normal, and the end says how to ask it.
    assert "WARNING the trained model answers no held-out row correctly" in done.err
    assert f"done output={output} report={output / 'report.html'}" in done.err
    last = done.err.splitlines()[-1]
    assert " -m job infer " in last
    assert last.endswith(' --row formulas:0"')


def test_a_changed_learning_rate_makes_all_but_prep_and_baseline_again(
    output: Path, cache: Path
) -> None:
    before = sums(output)
    done = job(*small_run(str(output), "--set", "train.learning_rate=1e-3", cache=cache))
    assert done.code == 0, done.err
    assert skipped(done.err) == {"prep", "baseline"}
    after = sums(output)
    assert after["adapter/adapter_model.safetensors"] != before["adapter/adapter_model.safetensors"]
    assert after["merged/model.safetensors"] != before["merged/model.safetensors"]
    assert after["data/train-00000.arrow"] == before["data/train-00000.arrow"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("no marker, missing file", marks=pytest.mark.slow),
        "cut file",
    ],
)
def test_a_stage_that_is_not_whole_is_made_again(output: Path, cache: Path, damage: str) -> None:
    before = sums(output)
    kept = {"prep", "baseline", "train", "export"}
    if damage == "no marker, missing file":
        (output / ".stages" / "eval.json").unlink()
        (output / "eval" / "baseline.json").unlink()
        kept -= {"baseline"}
    else:
        path = output / "eval" / "final.json"
        path.write_bytes(path.read_bytes()[:-5])
    done = job(*small_run(str(output), cache=cache))
    assert done.code == 0, done.err
    assert skipped(done.err) == kept
    assert sums(output).keys() == before.keys()


@pytest.mark.slow
def test_two_runs_of_one_spec_give_the_same_weights(finished: Path, tmp_path: Path) -> None:
    done = job(*small_run(str(tmp_path / "again"), cache=tmp_path / "cache"))
    assert done.code == 0, done.err
    first, second = sums(finished), sums(tmp_path / "again")
    weights = [path for path in first if path.startswith(("adapter/", "data/"))]
    assert len(weights) >= 6
    for path in [*weights, "merged/model.safetensors"]:
        assert first[path] == second[path], path


def test_a_stage_by_its_own_command_leaves_its_part(tmp_path: Path, cache: Path) -> None:
    arguments = small_run(str(tmp_path), cache=cache)[1:]
    assert job("prep", *arguments).code == 0
    assert (tmp_path / "data" / "stats.json").is_file()
    assert not (tmp_path / "adapter").exists()
    done = job("train", *arguments)
    assert done.code == 0, done.err
    assert skipped(done.err) == {"prep"}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "_SUCCESS").exists()


def test_sigterm_in_training_stores_a_checkpoint_and_the_next_run_resumes(
    tmp_path: Path, cache: Path
) -> None:
    output = tmp_path / "out"
    long = ["--set", "train.max_steps=20", "--set", "train.save_steps=1000"]
    process = start("3/20", *small_run(str(output), *long, cache=cache), code=held.CODE)
    assert process.stderr is not None
    for line in process.stderr:
        if "train step=3/20" in line:
            process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            break
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    assert time.monotonic() - sent < 20
    stopped = read_json(output / "run.json")
    assert stopped["status"] == "preempted"
    assert read_json(output / "train" / "label_proof.json")["trained_tokens"] > 0
    [checkpoint] = (output / "checkpoints").iterdir()
    step = read_json(checkpoint / "manifest.json")["step"]
    assert 3 <= step <= 4
    assert f"checkpoint of step {step} is stored" in rest

    done = job(*small_run(str(output), *long, cache=cache))
    assert done.code == 0, done.err
    assert f"resuming step={step}" in done.err
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))


def test_sigterm_outside_training_ends_with_143_at_once(tmp_path: Path, cache: Path) -> None:
    process = start(*small_run(str(tmp_path), "--set", "data.train.limit=100000", cache=cache))
    assert process.stderr is not None
    for line in process.stderr:
        if "prep: started" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    assert read_json(tmp_path / "run.json")["status"] == "preempted"


def test_plan_names_steps_parameters_and_what_will_be_skipped(output: Path, cache: Path) -> None:
    arguments = small_run(str(output), cache=cache)[1:]
    done = job("plan", *arguments, "--set", "train.learning_rate=1e-3")
    assert done.code == 0, done.err
    assert "4 (1.33 epochs of 3)" in done.out
    assert "402,432 (7.00%)" in done.out
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert "will be skipped" in lines["prep"]
    assert "will be skipped" in lines["baseline"]
    assert "will run" in lines["train"]


@pytest.mark.parametrize("weights", ["base", "adapter", "merged"])
def test_infer_answers_with_each_of_the_weights(
    output: Path, cache: Path, tmp_path: Path, weights: str
) -> None:
    image, latex = drawn(tmp_path)
    arguments = ["--image", image, "--weights", weights, "--max-new-tokens", "24"]
    done = job("infer", *small_run(str(output), cache=cache)[1:], *arguments)
    assert done.code == 0, done.err
    assert done.out.strip()
    assert weights != "base" or done.out == f"{latex}\n"


def test_infer_samples_as_its_options_say(output: Path, cache: Path, tmp_path: Path) -> None:
    image, latex = drawn(tmp_path)
    arguments = [*small_run(str(output), cache=cache)[1:], "--image", image, "--weights", "base"]
    sampled = [*arguments, "--temperature", "8", "--min-p", "0.001", "--max-new-tokens", "24"]
    first, again = (job("infer", *sampled, "--seed", "4") for _ in range(2))
    assert first.code == 0, first.err
    assert first.out == again.out != f"{latex}\n"
    short = job("infer", *arguments, "--max-new-tokens", "1").out.strip()
    assert latex.startswith(short)
    assert len(short) < len(latex)


def test_infer_names_the_option_that_cannot_be(cache: Path, tmp_path: Path) -> None:
    image, _ = drawn(tmp_path)
    arguments = [*small_run(str(tmp_path), cache=cache)[1:], "--image", image]
    done = job("infer", *arguments, "--temperature", "0")
    assert done.code == 10
    assert "eval.generation.temperature" in done.err


def test_infer_answers_a_held_out_row_beside_its_label(output: Path, cache: Path) -> None:
    first = (output / "eval" / "baseline.predictions.jsonl").read_text().splitlines()[0]
    told = json.loads(first)
    arguments = [*small_run(str(output), cache=cache)[1:], "--weights", "base"]
    done = job("infer", *arguments, "--row", told["id"])
    assert done.code == 0, done.err
    assert done.out == f"answer: {told['prediction']}\nlabel:  {told['label']}\n"

    done = job("infer", *arguments, "--row", "nothing:7")
    assert done.code == 12
    assert "no held-out row has this id (found nothing:7)" in done.err
    done = job("infer", *arguments, "--row", told["id"], "--question", "What?")
    assert done.code == 2
    assert "has its own images" in done.err


def test_an_image_that_is_missing_is_an_error_if_another_follows(
    cache: Path, tmp_path: Path
) -> None:
    image, _ = drawn(tmp_path)
    arguments = [*small_run(str(tmp_path / "out"), cache=cache)[1:], "--weights", "base"]
    done = job("infer", *arguments, "--image", "gone.png", "--image", image)
    assert done.code == 12
    assert "no such file (found gone.png)" in done.err


def drawn(directory: Path) -> tuple[str, str]:
    """The path of a picture as the tiny base was trained to read them, and its formula."""
    spec = load_spec(Path("specs/tiny-base.yaml").read_text(), "tiny-base", environ={}).spec
    assert spec.data.eval is not None
    sample = formulas.sample(spec.data.eval.formulas, 2)
    path = directory / "formula.png"
    path.write_bytes(sample.png)
    return str(path), sample.latex


@pytest.mark.slow
def test_a_full_fine_tuning_runs_the_same_chain(tmp_path: Path, cache: Path) -> None:
    done = job(*small_run(str(tmp_path), *sets(FULL), cache=cache))
    assert done.code == 0, done.err
    proof: dict[str, Any] = read_json(tmp_path / "merged" / "export.json")
    assert proof["trained_against_base"]["relative_rms"] > 1e-2
    assert proof["merged_reloaded"]["relative_rms"] < 1e-2
    assert not (tmp_path / "adapter").exists()
    assert (tmp_path / "weights" / "model.safetensors").is_file()


def test_published_weights_are_trained_and_the_adapter_is_written_for_vllm_too(
    finished: Path, tmp_path: Path, cache: Path
) -> None:
    """From what a first run merged: the published layout in, that of Transformers out."""
    settings = {
        "model.init": "pretrained",
        "model.model_name_or_path": finished / "merged",
        "lora.finetune_vision_layers": "false",
        "lora.finetune_mlp_modules": "false",
        "export.merged.layout": "transformers",
    }
    assert read_json(finished / "merged" / "config.json")["model_type"] == "ernie4_5_moe_vl"
    assert not (finished / "adapter-vllm").exists()  # it adapts more than vLLM serves
    done = job(*small_run(str(tmp_path), *sets(settings), cache=cache))
    assert done.code == 0, done.err
    assert read_json(tmp_path / "merged" / "config.json")["model_type"] == "ernie4_5_vl_moe"
    proof = read_json(tmp_path / "merged" / "export.json")
    assert (proof["layout"], proof["changed_tensors"]) == ("transformers", 16)
    served = safetensors.torch.load_file(tmp_path / "adapter-vllm" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.3.self_attn.o_proj.lora_B.weight" in served
    assert "adapter-vllm/adapter_model.safetensors" in sums(tmp_path)


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_what_vllm_can_serve_is_said_before_training(
    command: str, tmp_path: Path, cache: Path
) -> None:
    arguments = small_run(str(tmp_path), cache=cache)[1:]
    merged_only = job(command, *arguments)
    said = "as merged/ only; of an adapter vLLM serves language attention, and not language mlp"
    assert said in _said(merged_only)
    off = ("lora.finetune_vision_layers=false", "lora.finetune_mlp_modules=false")
    attention = job(command, *arguments, "--set", off[0], "--set", off[1])
    assert "as adapter-vllm/ beside the base, or as merged/" in _said(attention)


def _said(done: Any) -> str:
    assert done.code == 0, done.err
    return " ".join(f"{done.out}{done.err}".split())  # whatever the width of lines

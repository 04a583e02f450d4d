"""Which engine trains: by the spec, by what is installed, and by measurements."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import record
from job.engines.choice import MEASURED, PACKAGES, Measurement, choose
from job.engines.device import Accelerator
from job.errors import SpecError
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.jobs import ROOT, job, small_run

CPU = Accelerator(kind="cpu", name="a CPU", memory_bytes=2**34)
GPU = Accelerator(kind="cuda", name="NVIDIA H200", memory_bytes=2**37)
FASTER = Measurement(
    family="vlm", device="NVIDIA H200", compiled=False, transformers=10_000, unsloth=15_000
)
SLOWER = replace(FASTER, family="ernie45_vl", unsloth=9_000)


def spec(*overrides: str) -> JobSpec:
    path = ROOT / "specs" / "latex.yaml"
    return load_spec(path.read_text(), str(path), overrides, environ={}).spec


def chosen(
    asked: JobSpec,
    family: str | None = "vlm",
    device: Accelerator = GPU,
    *,
    processes: int = 1,
    present: Sequence[str] = PACKAGES,
) -> tuple[str, str]:
    choice = choose(
        asked, family, device, processes=processes, present=present, measured=(FASTER, SLOWER)
    )
    return choice.engine, choice.reason


def test_auto_selects_the_engine_that_measured_faster_on_the_device() -> None:
    engine, reason = chosen(spec())
    assert engine == "unsloth"
    assert "transformers 10,000 tokens a second, with unsloth 15,000" in reason
    assert chosen(spec(), "ernie45_vl")[0] == "transformers"


@pytest.mark.parametrize("family", ["llm", None])
def test_auto_guesses_nothing(family: str | None) -> None:
    engine, reason = chosen(spec(), family)
    assert engine == "transformers"
    assert "unsloth is not measured" in reason
    other = replace(GPU, name="NVIDIA L4")
    assert chosen(spec(), "vlm", other)[0] == "transformers"
    compiled = spec("train.torch_compile=true", "train.gradient_checkpointing=false")
    assert chosen(compiled)[0] == "transformers"
    assert chosen(spec(), "vlm", CPU) == ("transformers", "auto; there is no GPU")


@pytest.mark.parametrize(
    ("overrides", "processes", "present", "why"),
    [
        ((), 1, (), "the package unsloth is not installed"),
        ((), 1, ("unsloth",), "the package unsloth_zoo is not installed"),
        ((), 2, PACKAGES, "trains in one process, but 2 were started"),
        (("model.init=random",), 1, PACKAGES, "trains plain LoRA adapters on pretrained weights"),
        (("lora.use_dora=true",), 1, PACKAGES, "trains plain LoRA adapters on pretrained weights"),
        (("model.load_in_4bit=true",), 1, PACKAGES, "does not load a base in 4 bits"),
        (("train.neftune_noise_alpha=5",), 1, PACKAGES, "its forward passes add no noise"),
    ],
)
def test_auto_selects_transformers_if_the_faster_engine_cannot_train(
    overrides: tuple[str, ...], processes: int, present: Sequence[str], why: str
) -> None:
    engine, reason = chosen(spec(*overrides), processes=processes, present=present)
    assert engine == "transformers"
    assert why in reason


@pytest.mark.parametrize(
    ("family", "device", "processes", "present", "message"),
    [
        ("vlm", CPU, 1, PACKAGES, "$.model.engine needs a GPU, but torch sees none"),
        ("vlm", GPU, 2, PACKAGES, "$.model.engine trains in one process, but 2 were started"),
        ("vlm", GPU, 1, (), "$.model.engine the package unsloth is not installed"),
        ("ernie45_vl", GPU, 1, PACKAGES, "$.train.torch_compile must be false if unsloth"),
    ],
)
def test_an_engine_that_cannot_train_the_spec_is_rejected(
    family: str, device: Accelerator, processes: int, present: Sequence[str], message: str
) -> None:
    asked = spec(
        "model.engine=unsloth", "train.torch_compile=true", "train.gradient_checkpointing=false"
    )
    with pytest.raises(SpecError) as caught:
        chosen(asked, family, device, processes=processes, present=present)
    [problem] = caught.value.problems
    assert f"{problem.field} {problem.message}".startswith(message)
    assert problem.fix


def test_the_engine_that_the_spec_names_is_selected() -> None:
    assert chosen(spec("model.engine=unsloth"), None)[0] == "unsloth"
    assert chosen(spec("model.engine=transformers"))[0] == "transformers"


def test_the_table_is_what_was_measured() -> None:
    results = [json.loads(path.read_text()) for path in record.RESULTS.glob("engines-*.json")]
    found = [Measurement(device=each["device"], **m) for each in results for m in each["measured"]]
    assert set(MEASURED) == set(found)
    kinds = {(line.family, line.device, line.compiled) for line in MEASURED}
    assert len(kinds) == len(MEASURED)


def test_a_job_that_asks_for_it_without_a_gpu_ends_before_its_work(tmp_path: Path) -> None:
    done = job(
        *small_run(str(tmp_path / "out"), "--set", "model.engine=unsloth", cache=tmp_path),
        environ={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.code == 10
    assert "$.model.engine" in done.err
    assert "needs a GPU, but torch sees none" in done.err
    assert "set model.engine: transformers, or auto" in done.err
    assert "prep" not in done.err

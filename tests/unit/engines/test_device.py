"""What the machine decides if the spec leaves it open."""

import os
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from job.engines.device import (
    ALLOCATOR,
    Accelerator,
    Kind,
    detect,
    resolve_autocast,
    resolve_dtype,
)
from job.spec import keys
from job.spec.load import load_spec

SPEC = """
version: 1
name: sample
model: {model_name_or_path: models/base}
data: {train: {uri: data/train.jsonl}}
output: {uri: outputs/sample}
"""


@pytest.mark.parametrize(
    ("kind", "method", "dtype"),
    [
        ("cpu", "lora", torch.float32),
        ("cpu", "full", torch.float32),
        ("cuda", "lora", torch.bfloat16),
        ("rocm", "lora", torch.bfloat16),
        ("cuda", "full", torch.float32),
        ("rocm", "full", torch.float32),
    ],
)
def test_the_dtype_of_auto_goes_by_the_device_and_the_method_as_the_reference_says(
    kind: Kind, method: Literal["lora", "full"], dtype: torch.dtype
) -> None:
    spec = load_spec(SPEC, "", [f"lora.method={method}"], {}).spec
    device = Accelerator(kind=kind, name="some", memory_bytes=2**30)
    assert resolve_dtype(spec.model, spec.lora, device) == dtype
    node = keys.at(("model", "dtype"))
    assert node is not None
    in_full, adapted = node["description"].partition(". auto uses ")[2].split("; ")
    if kind == "cpu":
        assert in_full.startswith("float32 on a CPU")
    elif method == "full":
        assert "when lora.method is full" in in_full
    else:
        assert adapted.startswith("it uses bfloat16 for adapters on a GPU")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_trained_in_float32_and_computed_with_in_bfloat16(bias: str) -> None:
    spec = load_spec(SPEC, "", [f"lora.bias={bias}"], {}).spec
    device = Accelerator(kind="cuda", name="some", memory_bytes=2**30)
    assert resolve_dtype(spec.model, spec.lora, device) == torch.float32
    assert resolve_autocast(spec.model, spec.lora, device)


@pytest.mark.parametrize("named", ["float32", "bfloat16"])
def test_a_dtype_that_is_named_is_taken(named: str) -> None:
    spec = load_spec(SPEC, "", [f"model.dtype={named}"], {}).spec
    device = Accelerator(kind="cpu", name="some", memory_bytes=2**30)
    assert resolve_dtype(spec.model, spec.lora, device) == getattr(torch, named)


@pytest.mark.parametrize("given", [None, "max_split_size_mb:128"], ids=str)
def test_how_memory_is_kept_is_settled_before_a_gpu_is_touched(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is put back whatever the job makes of it
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(ALLOCATOR[1], given)
    seen: list[str | None] = []

    def touch(_: int) -> None:
        seen.extend(map(os.environ.get, ALLOCATOR))

    monkeypatch.setattr(torch.version, "hip", None)
    for name, found in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": touch,
        "get_device_properties": lambda _: SimpleNamespace(name="a GPU", total_memory=2**30),
        "get_per_process_memory_fraction": lambda _: 0.5,
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)
    spec = load_spec(SPEC, "", environ={}).spec
    found_here = detect(spec.runtime)
    assert (found_here.kind, found_here.memory_bytes) == ("cuda", 2**29)  # what it may take
    assert seen == ([None, given] if given else ["expandable_segments:True", None])

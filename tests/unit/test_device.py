"""What the machine decides where the spec leaves it open."""

from typing import Literal

import pytest
import torch

from job.engines.device import Accelerator, Kind, resolve_dtype
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
    in_full, adapted = node["description"].partition(". auto takes ")[2].split("; ")
    if kind == "cpu":
        assert in_full.startswith("float32 on a CPU")
    elif method == "full":
        assert "where lora.method is full" in in_full
    else:
        assert adapted.startswith("bfloat16 on a GPU under an adapter")


@pytest.mark.parametrize("named", ["float32", "bfloat16"])
def test_a_dtype_that_is_named_is_taken(named: str) -> None:
    spec = load_spec(SPEC, "", [f"model.dtype={named}"], {}).spec
    device = Accelerator(kind="cpu", name="some", memory_bytes=2**30)
    assert resolve_dtype(spec.model, spec.lora, device) == getattr(torch, named)

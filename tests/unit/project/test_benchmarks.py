"""What benchmarks measure is what a training computes."""

from collections import Counter
from typing import Any

import torch

from benchmarks.training import SPEC, encoded_rows, random_weights
from job import families
from job.families.ernie45_vl import Ernie45VL
from job.spec.load import load_spec
from tests.jobs import ROOT

TINY = ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny"
EXPERTS, CHOSEN = 64, 6


def test_the_tokens_of_a_random_model_go_to_all_experts() -> None:
    spec = load_spec(SPEC.read_text(), "latex.yaml", environ={}).spec
    checkpoint = families.read_checkpoint("builtin://ernie-vl-tiny", TINY)
    family = Ernie45VL.bind(checkpoint, spec.data)
    config = family.meta_model().config
    config.text_config.moe_num_experts, config.text_config.moe_k = EXPERTS, CHOSEN
    torch.manual_seed(0)
    model = random_weights(config, family, torch.device("cpu"))
    family.use_packed_step(model)
    loads: dict[str, Counter[int]] = {}

    def note(name: str) -> Any:
        def hook(_gate: Any, _inputs: Any, outputs: Any) -> None:
            loads.setdefault(name, Counter()).update(outputs[2].flatten().tolist())

        return hook

    for name, module in model.named_modules():
        if name.endswith("_moe.gate"):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(**family.pack(encoded_rows(family, 4)))
    assert len(loads) == 6, "three sparse layers, each with experts for text and for pictures"
    for name, load in loads.items():
        assert len(load) > 3 * CHOSEN, f"{name}: {load}"
        busiest = sum(count for _, count in load.most_common(CHOSEN))
        assert busiest < 0.8 * load.total(), f"{name}: {load}"

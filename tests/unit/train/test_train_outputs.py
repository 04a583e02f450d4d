"""What training writes, and the model after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from job import engines, families
from job.engines.device import detect
from job.spec.load import load_spec
from job.train.outputs import store_adapter, without_autocast
from tests.jobs import ROOT
from tests.models import BUILDERS
from tests.unit.families.test_packed_step import image, row


def test_a_trained_model_has_its_class_s_forward_again() -> None:
    spec = load_spec((ROOT / "specs/latex.yaml").read_text(), "latex.yaml", environ={}).spec
    tiny = ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny"
    family = families.bind(families.read_checkpoint("tiny", tiny), spec.model, spec.data)
    model: Any = family.load(dtype=torch.float32, device=torch.device("cpu"))
    family.use_packed_step(model)
    prompt = family.collate_prompts([family.encode(row("x", image(56, 56)))])
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        trained = accelerator.prepare(model)
        assert "forward" in vars(trained), "autocast is around it"
        done = without_autocast(accelerator.unwrap_model(trained))
    finally:
        AcceleratorState._reset_state(True)
    assert done is model
    assert torch.equal(done.generate(**prompt, max_new_tokens=3, do_sample=False), answer)


@pytest.mark.parametrize("kind", ["ernie", "qwen_vl", "llama"])
def test_an_adapter_s_folder_loads_tokenizer_processor_and_template(
    kind: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoProcessor, AutoTokenizer

    base = ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny"
    if kind != "ernie":
        base = tmp_path / "base"
        BUILDERS[kind](base)
    sets = [f"model.model_name_or_path={base}", "runtime.accelerator=cpu"]
    sets += ["lora.finetune_vision_layers=false", "lora.finetune_mlp_modules=false"]
    spec = load_spec((ROOT / "specs/latex.yaml").read_text(), "latex.yaml", sets, environ={}).spec
    family = families.bind(families.read_checkpoint("base", base), spec.model, spec.data)
    engine = engines.create(spec.model, spec.lora, detect(spec.runtime))
    model = engine.initialize(family, 1)
    model = engine.attach_adapter(model, family.lora_targets(model, spec.lora), spec.lora, 1)
    out = tmp_path / "out"
    store_adapter(spec, family, model, None, out)

    read: Any = AutoTokenizer.from_pretrained(out / "adapter")
    own = family.processor.tokenizer
    text = own.decode(family.encode(row("x^{2}")).input_ids)
    assert read(text).input_ids == own(text).input_ids
    turns = [{"role": "user", "content": "Read."}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    assert read.apply_chat_template(turns, **asked) == own.apply_chat_template(
        turns, chat_template=(out / "adapter" / "chat_template.jinja").read_text(), **asked
    )
    if family.reads_images:
        processor = AutoProcessor.from_pretrained(out / "adapter")
        assert type(processor) is type(family.processor)
        assert processor.image_processor.size == family.processor.image_processor.size  # type: ignore[attr-defined]
    PeftModel.from_pretrained(engine.initialize(family, 1), out / "adapter")
    settings = (out / "adapter" / "tokenizer_config.json").read_text()
    assert "is_local" not in settings
    assert {path.name for path in (out / "adapter-vllm").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

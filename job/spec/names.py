"""Names that people write in place of the ones a spec has, and what to write instead."""

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

from job.spec import keys

# What other tools, and this one's neighbours in Transformers and PEFT, call the same thing.
ALIASES = {
    "alpha": "lora.lora_alpha",
    "attn": "model.attn_implementation",
    "attention": "model.attn_implementation",
    "base_model": "model.model_name_or_path",
    "batch_size": "train.per_device_train_batch_size",
    "bf16": "model.dtype",
    "checkpoint": "model.model_name_or_path",
    "cutoff_len": "train.max_length",
    "dataset": "data.train.uri",
    "datasets": "data.train.uri",
    "dataset_name": "data.train.uri",
    "dora": "lora.use_dora",
    "dropout": "lora.lora_dropout",
    "epochs": "train.num_train_epochs",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "fp16": "model.dtype",
    "image_dir": "data.train.image_folder",
    "image_root": "data.train.image_folder",
    "media_dir": "data.train.image_folder",
    "grad_accum": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm",
    "interleave_probs": "data.train.weight",
    "probabilities": "data.train.weight",
    "learningrate": "train.learning_rate",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "max_eval_samples": "eval.max_samples",
    "max_samples": "data.train.limit",
    "max_seq_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "micro_batch_size": "train.per_device_train_batch_size",
    "model_id": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "model_path": "model.model_name_or_path",
    "num_epochs": "train.num_train_epochs",
    "optimizer": "train.optim",
    "output_dir": "output.uri",
    "prompt": "data.instruction",
    "system_prompt": "data.system",
    "default_system": "data.system",
    "train_on_last_turn": "data.train_on",
    "mask_history": "data.train_on",
    "random_state": "train.seed",
    "rank": "lora.r",
    "scheduler": "train.lr_scheduler_type",
    "seq_len": "train.max_length",
    "sequence_len": "train.max_length",
    "sequence_length": "train.max_length",
    "shuffle": "data.train.shuffle_seed",
    "target_params": "lora.target_parameters",
    "torch_dtype": "model.dtype",
    "train_batch_size": "train.per_device_train_batch_size",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "warmup": "train.warmup_steps",
    "wd": "train.weight_decay",
}

# What people call the place of a thing, whichever it is; it is a key of each of these sections.
PLACES = ("dir", "directory", "file", "files", "folder", "location", "path", "source", "src", "url")
PLACED = ("model.model_name_or_path", "data.train.uri", "output.uri")

# Sections under another name; their content is not looked at.
SECTIONS = {
    "evaluation": "eval",
    "peft": "lora",
    "peft_config": "lora",
    "trainer": "train",
    "training": "train",
    "training_args": "train",
}

# What has no counterpart, with the nearest thing there is.
ABSENT = {
    "deepspeed": "write runtime.distributed: fsdp2, which shares the weights among processes",
    "fsdp": "write runtime.distributed: fsdp2",
    "load_in_4bit": "remove it: quantized training is not offered by this version",
    "load_in_8bit": "remove it: quantized training is not offered by this version",
    "warmup_ratio": "write train.warmup_steps, the number of steps",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, where one is like it at all."""
    by_plain = {_plain(other): other for other in known}
    close = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.7)
    return by_plain[close[0]] if close else None


def instead_of(path: keys.Path) -> str:
    """What to do about the unknown key at `path`, as an instruction."""
    *above, last = path
    name, section = str(last), tuple(above)
    here = list((keys.at(section) or {}).get("properties", {}))
    if name in ABSENT:
        return ABSENT[name]
    elsewhere = [dotted for dotted in keys.dotted_keys() if dotted.split(".")[-1] == name]
    if name in ALIASES or elsewhere:
        return _move(section, [ALIASES[name]] if name in ALIASES else elsewhere)
    if name.lower() in PLACES and not nearest(name, here):
        return _move(section, [at for at in PLACED if at.split(".")[0] in section[:1]] or [*PLACED])
    if not section and name in SECTIONS:
        return f"write {SECTIONS[name]}"
    if close := nearest(name, here):
        return f"write {close}"
    leaves = {dotted.split(".")[-1]: dotted for dotted in reversed(keys.dotted_keys())}
    if close := nearest(name, leaves):
        return _move(section, [leaves[close]])
    return f"remove it; known here: {', '.join(here)}" if here else "remove it"


def quoted(value: Any) -> str:
    """A value as a user would write it, on one line."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return json.dumps(value, default=str)


def _move(section: keys.Path, targets: list[str]) -> str:
    parent = ".".join(part for part in section if isinstance(part, str))
    for target in targets:
        above, _, leaf = target.rpartition(".")
        if above == parent or _twin(above) == parent:
            return f"write {leaf}"
    if section[:2] == ("data", "eval"):  # the keys of one source are those of the other
        targets = [t for t in targets if not t.startswith("data.train.")] or targets
    elif len(targets) > 1:
        targets = [t for t in targets if not t.startswith("data.eval.")] or targets
    return f"move it to {' or '.join(targets)}"


def _twin(above: str) -> str:
    return above.replace("data.train", "data.eval")


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.lower())

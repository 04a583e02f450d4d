"""ERNIE-4.5-VL, by Transformers' native `ernie4_5_vl_moe` classes, without remote code.

- `family` implements the `Family` protocol, mostly by calling the modules below;
- `checkpoint_files` and `published_format` convert between the published file layout and
  Transformers' own;
- `collate`, `mrope` and `image_processing` build batches;
- `lora_targets` selects modules, `activation_memory` estimates memory, both by module names;
- `packed` is the training step without padding; `vision_attention` speeds up the padded one;
- `tiny` builds `builtin://ernie-vl-tiny`; `published_configs` has the published configurations.
"""

from job.families.ernie45_vl.family import EMPTY_THOUGHT, Ernie45VL

__all__ = ["EMPTY_THOUGHT", "Ernie45VL"]

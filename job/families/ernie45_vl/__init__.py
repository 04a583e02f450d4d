"""ERNIE-4.5-VL, by Transformers' native `ernie4_5_vl_moe` classes, without remote code.

- `family` is the family itself; it answers most questions with one of the modules below;
- `checkpoint_files` and `published_format` translate between the published file layout and
  Transformers' own;
- `collate`, `mrope` and `image_processing` build batches;
- `lora_targets` and `activation_memory` know the architecture's modules;
- `packed` is the training step without padding, `vision_attention` speeds up the padded one;
- `tiny` builds `builtin://ernie-vl-tiny`, `published_configs` knows the published checkpoints.
"""

from job.families.ernie45_vl.family import EMPTY_THOUGHT, Ernie45VL

__all__ = ["EMPTY_THOUGHT", "Ernie45VL"]

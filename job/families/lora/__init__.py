"""LoRA for all families: target selection, and layers that are faster than PEFT's.

- `targets` selects modules by the spec's toggles or names;
- `linear` has `LoraLinear`, which replaces PEFT's linear layer, and functions that compute several
  layers together, or one layer's output in parts;
- `fused` computes each such call with one matrix product, in compiled blocks.

Interface with `job.engines`, which compiles blocks: the engine gets from each `FusableBlock` the
layers that it computes together, builds a `FusedLoraLinear` for them, and assigns it to
`LoraLinear.fused`. It refreshes the copies of the adapters' weights before each forward pass, and
resets `fused` to None after training.
"""

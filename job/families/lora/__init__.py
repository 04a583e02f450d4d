"""LoRA in every family: which modules it adapts, and layers that compute it faster than PEFT's.

- `targets` selects modules by the spec's toggles or names;
- `linear` has `LoraLinear`, which replaces PEFT's linear layer, and the calls by which blocks
  compute several layers, or a layer in parts;
- `fused` computes such calls with one matrix product each, in compiled blocks.

The seam with `job.engines`, which compiles blocks: the engine asks each `FusableBlock` for the
layers of its calls, builds a `FusedLoraLinear` of them, and assigns it to `LoraLinear.fused`. It
refreshes the adapters' copies before each forward pass, and resets `fused` to None after training.
"""

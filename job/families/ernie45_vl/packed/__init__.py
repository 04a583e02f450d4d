"""ERNIE-4.5-VL's training step without padding and without device syncs.

The rows of a batch are concatenated (TRL's `padding_free`), and the data workers compute all
indices that the model would otherwise compute on the device. The modules and their adapters are
those of Transformers and PEFT; this package only changes their forward passes.

Reading order: `batch.pack` builds the inputs; `model.PackedErnie` runs the forward pass from
embeddings to loss; `layers` has the vision block and the decoder layer, whose parts are in
`varlen_attention`, `rope`, `experts` (with `router`, `swiglu` and `expert_lora`) and
`feed_forward`.
"""

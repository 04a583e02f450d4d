"""ERNIE-4.5-VL's training step without padding, and without waiting for the device.

The rows of a batch are concatenated (TRL's `padding_free`), and the data workers compute every
index that the model would otherwise compute on the device. The modules are Transformers' own,
adapters included; only the order of calls is written here.

To read a step: `batch.pack` builds its inputs; `model.PackedErnie` runs it from embeddings to loss;
`layers` has the vision block and the decoder layer, whose parts are `varlen_attention`, `rope`,
`experts` (with `router`, `swiglu` and `expert_lora`) and `feed_forward`.
"""

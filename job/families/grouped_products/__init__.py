"""Grouped matrix products: rows sorted by expert, each times its own expert's matrix.

`choice.grouped_mm` is what models call. It selects torch's kernel where that is one kernel, and the
project's Triton kernels on other GPUs: neither waits for the device, so both can be captured as a
CUDA graph. `operators` are the Triton kernels as differentiable operators, `launch` starts them,
`tiles` says with which tile sizes on which device, and `kernels` holds them.
"""

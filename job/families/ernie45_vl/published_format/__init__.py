"""The layout in which ERNIE-4.5-VL is published, and the only one of it that vLLM reads.

A flat `config.json` (`model_type: ernie4_5_moe_vl`), one tensor for each expert, a preprocessor
with the original keys, and two modules of Python that stand in for the published remote code.
"""

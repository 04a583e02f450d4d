"""The file layout in which ERNIE-4.5-VL is published, the only one that vLLM reads.

A flat `config.json` (`model_type: ernie4_5_moe_vl`), one tensor for each expert, a preprocessor
with the published keys, and two Python modules that replace the published remote code.
"""

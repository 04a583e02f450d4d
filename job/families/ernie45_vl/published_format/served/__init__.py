"""Modules that are copied into the exported folder, from which vLLM loads them as remote code.

They replace the published remote code: importing them downloads nothing, and the same Transformers
processor as in training cuts images into patches. They must not import this project.
"""

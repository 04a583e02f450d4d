"""The export stage: merges the weights, and verifies them by reloading and by serving with vLLM.

Imports: spec, storage, prep, families, engines.
"""

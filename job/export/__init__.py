"""The export stage: merged weights written, reloaded and proven, and served by vLLM.

Imports: spec, storage, prep, families, engines.
"""

"""The export stage: merges the adapter, and verifies the result by reloading and by serving it.

Imports: spec, storage, prep, families, engines.
"""

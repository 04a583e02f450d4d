"""The train stage: a model, its data and the spec in; a trained adapter, or weights, out.

Imports: spec, storage, distributed, telemetry, artifacts, prep, families, engines.
"""

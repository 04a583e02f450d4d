"""The train stage: trains an adapter, or the model's weights, on the prepared rows.

Imports: spec, storage, distributed, telemetry, artifacts, prep, families, engines.
"""

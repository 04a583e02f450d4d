"""A run: its stages in order, their fingerprints, and how it ends.

Imports: spec, storage, distributed, telemetry, local, artifacts, prep, families, engines, train,
evaluation, export.
"""

"""A run: its stages in order, their fingerprints, and what becomes of them.

Imports: spec, storage, distributed, telemetry, local, artifacts, prep, families, engines, train,
evaluation, export.
"""

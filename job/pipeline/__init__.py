"""Runs a job: its stages in order, their fingerprints, and success, failure or preemption.

Imports: spec, storage, distributed, telemetry, local, artifacts, prep, families, engines, train,
evaluation, export, rewards, reinforce.
"""

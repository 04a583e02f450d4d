"""The command line: commands with their help and completion, and how the process ends.

Imports: spec, storage, distributed, local, artifacts, prep, families, engines, train, evaluation,
export, pipeline, planning, kubernetes, doctor, parity, drafting.
"""

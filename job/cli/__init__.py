"""The command line: one module a command, help, and how the process ends.

Imports: spec, storage, distributed, local, artifacts, prep, families, train, evaluation, export,
pipeline, planning, kubernetes, doctor.
"""

"""The evaluation stages: answers to held-out rows and their scores; pages of a run and of several.

Imports: spec, storage, artifacts, prep, families, engines.
"""

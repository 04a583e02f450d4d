"""The evaluation stages and the report: answers to held-out rows, their scores, an HTML page.

Imports: spec, artifacts, prep, families.
"""

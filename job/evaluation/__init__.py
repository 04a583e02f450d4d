"""The eval stages and the report: answers to held-out rows, their scores, and the HTML page.

Imports: spec, artifacts, prep, families.
"""

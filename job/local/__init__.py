"""State on this machine: the work folder of a run, and caches shared by runs.

A work folder belongs to one run, which locks it. Files in either are used only if their digest
matches the recorded one.

Imports: storage.
"""

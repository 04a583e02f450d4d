"""State on this machine: the work folder of a run, and caches that runs share.

A work folder belongs to one run, which locks it. A file in either counts only if its digest is the
recorded one.

Imports: storage.
"""

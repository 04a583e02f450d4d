"""What the job keeps on this machine: the work folder of a run, and caches that runs share.

A work folder belongs to one run, which holds it by a lock. Nothing found in either is believed
unless its digest is the recorded one.

Imports: storage.
"""

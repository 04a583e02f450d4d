"""`job parity`: runs the tiny job here, and compares what it gives with committed results.

`measure` runs the job, its logits, the ways to compute and the tests for GPUs; `compare` holds the
record against those of other devices, within the tolerances that it states.

Imports: spec, artifacts, prep, families, engines.
"""

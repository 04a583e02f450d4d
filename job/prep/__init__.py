"""The prep stage: reads rows from any source, checks them, and writes them as shards.

Imports: spec, storage, distributed, local.
"""

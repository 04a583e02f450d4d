"""The prep stage: records of any source in, checked rows in shards out.

Imports: spec, storage, local.
"""

"""What a run writes to its output: records, stages, checksums, lease, SBOM, provenance.

Imports: spec, storage, local.
"""

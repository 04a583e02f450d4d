"""What a run writes at its output: records, checksums, the lease, uploads, SBOM, provenance.

Imports: spec, storage, local.
"""

"""The output of a run: records, stages, checksums, lease, uploads, SBOM, provenance.

Imports: spec, storage, local.
"""

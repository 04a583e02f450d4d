"""The spec: its JSON Schema, and parsing, validating and resolving it into frozen dataclasses.

Imports: no other room.
"""

"""The spec: its JSON Schema, and reading, checking and resolving it into frozen dataclasses.

Imports: no other room.
"""

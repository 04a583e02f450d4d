"""Distributed training: ranks, coordination of processes, the process group.

Imports: no other room.
"""

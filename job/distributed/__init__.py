"""Distributed training: ranks, coordination of processes, the process group, shared CPU cores.

Imports: no other room.
"""

"""Several processes that train together: their ranks, what they exchange, the process group.

Imports: no other room.
"""

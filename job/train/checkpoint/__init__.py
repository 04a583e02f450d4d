"""Checkpoints of a training: what they hold, how they are stored, read and resumed from."""

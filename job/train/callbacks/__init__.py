"""Trainer callbacks: progress, checkpoints, stopping."""

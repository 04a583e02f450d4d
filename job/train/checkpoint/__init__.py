"""Training checkpoints: their content, their storage, and resuming from them."""

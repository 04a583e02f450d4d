"""What happens around the training's steps: progress, checkpoints, stopping."""

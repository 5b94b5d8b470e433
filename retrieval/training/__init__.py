"""Losses, negatives and the training loop."""

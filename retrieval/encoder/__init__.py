"""Encoders that turn a user's history into an embedding, and what it takes to save, load and run them."""

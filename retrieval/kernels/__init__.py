"""Tensor operations of the encoder, each beside a plain reference that runs in float64."""

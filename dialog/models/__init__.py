"""Transformers of dialogue in Linen: three families, in and out of checkpoints."""

"""Exact and certified machine unlearning; empty today."""

"""Spectrally normalised value-based deep reinforcement learning.

`losses`, `spectral`, `networks`, `replay` and `agent` are pure functions to import and combine;
`train`, `evaluate` and `cli` run whole experiments. Nothing is imported here, so that each module
costs only what it needs: `from jaxrl import losses`.
"""

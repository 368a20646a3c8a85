"""Dialog models with long-term memory; empty today."""

"""Metrics and losses of the full network."""

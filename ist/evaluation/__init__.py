"""Metrics and losses of the whole network."""

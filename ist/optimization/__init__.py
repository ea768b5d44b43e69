"""Optimizers by name, what a schedule sets at each step, and which steps a round has."""

"""Optimizers by name or by a function, what a schedule sets at each step, and which steps a round has."""

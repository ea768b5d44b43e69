"""Quantities that the theorems are about: problems, masks, kernels, bounds, and statistics of runs."""

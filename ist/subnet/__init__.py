"""Which neurons each worker holds in a round, and the slices and modules that follow from it."""

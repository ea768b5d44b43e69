"""Which neurons each worker holds in a round, and the tensor slices and modules that follow from that."""

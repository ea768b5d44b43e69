"""Find the neuron groups of a network: run it once on an example, and see which positions belong together."""

"""Find the neuron groups of a network: trace one forward pass and see which tensor positions belong together."""

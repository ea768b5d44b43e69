"""Loading the data of a run in each of its processes."""

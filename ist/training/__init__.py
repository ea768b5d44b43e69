"""A round: the loop, the coordinator, the worker."""

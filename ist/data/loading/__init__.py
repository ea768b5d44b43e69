"""Reading batches: in the worker's process, or ahead of time in loader processes."""

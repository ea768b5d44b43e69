"""Data sets, and the assignment of their samples to workers as shards and batches."""

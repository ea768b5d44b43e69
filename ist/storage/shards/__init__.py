"""Checkpoints in shards: who writes which tensors, and how they are written and read, so that no process holds all."""

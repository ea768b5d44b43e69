"""A run on disk: its folder, its checkpoints, one writer at a time."""

"""A run on disk: its run folder, its checkpoints, and a lock that allows one writer at a time."""

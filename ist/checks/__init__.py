"""Checks of a network and its data that end a run before it starts, or stop it before it computes something else."""

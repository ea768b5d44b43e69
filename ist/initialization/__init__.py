"""The values that a network starts with, without memory for the full network."""

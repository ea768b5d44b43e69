"""A worker's local steps: the part of a round that it makes, the built-in loop, and a user's own loop."""

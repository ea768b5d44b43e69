"""Open a run: make the method that trains in this process."""

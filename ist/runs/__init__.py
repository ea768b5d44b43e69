"""Put a run together in each process: build it, check it, open it, record it."""

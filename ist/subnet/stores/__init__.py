"""Where the full network is stored: in one process, or in shards."""

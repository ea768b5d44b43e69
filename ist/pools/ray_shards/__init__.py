"""The full network in shards on Ray: actors own its rows, other actors train, and the driver only schedules."""

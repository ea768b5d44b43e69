"""Start the processes of a run on one machine: directly, or on simulated hosts whose links have a chosen rate."""

"""Start the processes of a run on one machine, on its own network or on hosts with links of a chosen rate."""

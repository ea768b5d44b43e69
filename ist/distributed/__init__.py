"""Working with other processes: rank, device, process group, run secret, ports, memory limit."""

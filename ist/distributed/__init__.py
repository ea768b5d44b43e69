"""What a process needs to work with others: its rank, its device, its process group, its memory limit."""

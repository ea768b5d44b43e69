"""Who carries a subnet to a worker and back: in this process, over torch.distributed, or on Ray."""

"""Worker pools: they carry subnets to workers and results back, in one process, over torch.distributed, or on Ray.

Where it sits: `ist/training/coordinator.py` uses a pool through `WorkerPool` (`ist/transport/interfaces.py`);
`ist/runs/opening/methods.py` creates it.
Not here: the content of messages (`ist/transport/`), the workers' training (`ist/training/worker.py`).
"""

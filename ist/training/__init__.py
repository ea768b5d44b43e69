"""Training in rounds: the round loop, the coordinator, the workers with their state, and the local steps.

Where it sits: `ist/runs/` builds these objects, and `ist/pools/` carries subnets between coordinator and workers.
Not here: what a subnet is (`ist/subnet/`), and the methods that IST is compared with (`ist/baselines/`).
"""

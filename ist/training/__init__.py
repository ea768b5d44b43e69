"""Training in rounds: the round loop, the coordinator, and the workers with their state.

Where it sits: `ist/runs/` builds these objects, and `ist/pools/` carries subnets between coordinator and workers.
Not here: local steps (`ist/loops/`), what a subnet is (`ist/subnet/`), and the methods that IST is compared with
(`ist/baselines/`).
"""

"""A run in one process: build the job, check it, open this process's part, execute it, record it.

Where it sits: between the entry points (`ist/cli/`, `ist/api.py`) and the training (`ist/training/`, `ist/pools/`,
`ist/baselines/`).
Not here: starting processes (`ist/launch/`), the round loop (`ist/training/rounds.py`).
"""

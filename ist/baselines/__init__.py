"""The methods that IST is compared with, on the same model, data and processes: data parallelism, local SGD, DiLoCo.

Where it sits: `ist/config/methods.py` lists the methods with their options; `ist/runs/open.py` creates them.
Not here: the round loop (`ist/training/rounds.py`), IST itself (`ist/training/coordinator.py`).
"""

"""Baselines whose ranks have data of their own: the program of the ranks.

python -m tests.forked_ranks N tests/baselines/own_data.py OUT METHOD ...
"""

import sys
from pathlib import Path

import torch

from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart
from ist.storage.checkpoint import write_tensors
from tests.pools.scenario import job

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, *methods = sys.argv[1:]
    for method in methods:
        made, _ = job("own data", method=method, pool={"kind": "torchrun", "device": "cpu"})
        part = execute(made, progress=False)
        if isinstance(part, CoordinatorPart):
            write_tensors(Path(out) / f"{method}.safetensors", part.method.model.state_dict(), {})

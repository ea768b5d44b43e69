"""Files of a node's own, of unequal length, that no other node can read.

torchrun --nproc-per-node 2 examples/ten_jobs/own_files.py ddp FOLDER      # or: ist
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import ist

torch.manual_seed(0)
IMAGES, CLASSES = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
TEST = TensorDataset(IMAGES[1400:].float() / 16, CLASSES[1400:].long())
MODEL = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def own_data() -> TensorDataset:
    """Write the file of this node, which a real node would have, and return its samples."""
    rank = int(os.environ["RANK"])
    rows = range(rank, 500 * (rank + 1), 2)
    path = Path(sys.argv[2]) / f"node-{rank}.pt"
    torch.save([IMAGES[rows].float() / 16, CLASSES[rows].long()], path)
    return TensorDataset(*torch.load(path))


@torch.no_grad()
def score(model: nn.Module) -> float:
    """Return the loss on the images that are held out."""
    inputs, targets = TEST.tensors
    return float(nn.functional.cross_entropy(model(inputs), targets))


def ddp() -> None:
    """Train by plain data-parallel training."""
    dist.init_process_group("gloo")
    before = score(MODEL)
    replica = DistributedDataParallel(MODEL)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
    loader = DataLoader(own_data(), batch_size=16, shuffle=True)
    for _ in range(8):
        with replica.join():  # a rank whose file is shorter joins in the collectives of the others
            for inputs, targets in loader:
                loss = nn.functional.cross_entropy(replica(inputs), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before = score(MODEL)
    result = ist.train(
        MODEL, own_data(), shard="own", workers=2, local_steps=15, rounds=12, batch_size=16,
    )  # fmt: skip
    if result.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

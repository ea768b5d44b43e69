"""A callback: training ends when the test loss has not improved for two evaluations.

torchrun --nproc-per-node 2 examples/ten_jobs/early_stopping.py ddp      # or: ist
"""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ist
from ist.callbacks import EarlyStopping

torch.manual_seed(0)
IMAGES, CLASSES = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
IMAGES, CLASSES = IMAGES.float() / 16, CLASSES.long()
TRAIN, TEST = TensorDataset(IMAGES[:800], CLASSES[:800]), TensorDataset(IMAGES[1400:], CLASSES[1400:])
MODEL = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


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
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.5)
    sampler = DistributedSampler(TRAIN)
    loader = DataLoader(TRAIN, batch_size=32, sampler=sampler)
    best, without, epoch = before, 0, 0
    while without < 2 and epoch < 40:
        sampler.set_epoch(epoch)
        epoch += 1
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(replica(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        now = score(MODEL)
        without = 0 if now < best else without + 1
        best = min(best, now)
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before = score(MODEL)
    result = ist.train(
        MODEL, TRAIN, test_data=TEST, workers=2, local_steps=13, rounds=40,
        optimizer=ist.Optimizer(name="SGD", args={"lr": 0.5}), callbacks=[EarlyStopping("test_loss", patience=2)],
    )  # fmt: skip
    if result.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

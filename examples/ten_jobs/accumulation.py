"""A perceptron with gradients accumulated over four micro-batches.

torchrun --nproc-per-node 2 examples/ten_jobs/accumulation.py ddp      # or: ist
"""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ist

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
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.3)
    sampler = DistributedSampler(TRAIN)
    loader = DataLoader(TRAIN, batch_size=8, sampler=sampler)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for number, (inputs, targets) in enumerate(loader):
            replica.require_backward_grad_sync = number % 4 == 3
            loss = nn.functional.cross_entropy(replica(inputs), targets) / 4
            loss.backward()
            if number % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before = score(MODEL)
    run = ist.join(
        MODEL, example=IMAGES[:2], local_steps=12, rounds=4,
        optimizer=lambda named: torch.optim.SGD(named.values(), lr=0.3),
    )  # fmt: skip
    sampler = DistributedSampler(TRAIN, run.num_workers, run.worker)
    loader = DataLoader(TRAIN, batch_size=8, sampler=sampler)
    for part in run:
        for number, (inputs, targets) in enumerate(part.take(loader)):  # ends after 12 optimizer steps
            loss = nn.functional.cross_entropy(part.model(inputs), targets) / 4
            loss.backward()
            if number % 4 == 3:
                part.optimizer.step()
                part.optimizer.zero_grad()
            part.log(loss * 4, len(inputs))
    if run.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

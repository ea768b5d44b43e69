"""An endless stream of samples (IterableDataset): each rank reads its own part of it.

torchrun --nproc-per-node 2 examples/ten_jobs/stream.py ddp      # or: ist
"""

import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

import ist

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


class Spirals(IterableDataset[tuple[Tensor, int]]):
    """Points on three noisy spirals, and which spiral they are on."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            spiral = int(torch.randint(3, (), generator=generator))
            radius = torch.rand((), generator=generator).sqrt()
            angle = 4 * radius + spiral * 2.1 + 0.1 * torch.randn((), generator=generator)
            yield radius * torch.stack([angle.cos(), angle.sin()]), spiral


@torch.no_grad()
def score(model: nn.Module) -> float:
    """Return the loss on points of another stream."""
    points, spirals = next(iter(DataLoader(Spirals(-1), batch_size=256)))
    return float(nn.functional.cross_entropy(model(points), spirals))


def ddp() -> None:
    """Train by plain data-parallel training."""
    dist.init_process_group("gloo")
    before = score(MODEL)
    replica = DistributedDataParallel(MODEL)
    optimizer = torch.optim.Adam(replica.parameters(), lr=1e-2)
    loader = DataLoader(Spirals(int(os.environ["RANK"])), batch_size=32)
    for _, (points, spirals) in zip(range(100), loader, strict=False):
        loss = nn.functional.cross_entropy(replica(points), spirals)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before = score(MODEL)
    run = ist.join(
        MODEL, example=torch.zeros(2, 2), local_steps=10, rounds=10,
        optimizer=lambda named: torch.optim.Adam(named.values(), lr=1e-2),
    )  # fmt: skip
    loader = DataLoader(Spirals(run.worker), batch_size=32)
    for part in run:
        for points, spirals in part.take(loader):
            loss = nn.functional.cross_entropy(part.model(points), spirals)
            loss.backward()
            part.optimizer.step()
            part.optimizer.zero_grad()
            part.log(loss, len(points))
    if run.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

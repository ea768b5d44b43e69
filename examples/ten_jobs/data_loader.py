"""A DataLoader with worker processes and a collate function that pads sequences to the longest of the batch.

torchrun --nproc-per-node 2 examples/ten_jobs/data_loader.py ddp      # or: ist
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import ist

torch.manual_seed(0)
LENGTHS = torch.randint(3, 12, (480,))
LINES = [torch.randint(1, 10, (int(length),)) for length in LENGTHS]
ITEMS: Any = [(line, int(line.float().mean() > 5)) for line in LINES]  # whether the digits are large
MODEL = nn.Sequential(
    nn.Embedding(10, 32, padding_idx=0), nn.Linear(32, 64), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 64)), nn.Flatten(),
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2),
)  # fmt: skip


def padded(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Return lines, (batch, longest), and their classes, (batch,)."""
    lines, classes = zip(*items, strict=True)
    return nn.utils.rnn.pad_sequence(list(lines), batch_first=True), torch.tensor(classes)


@torch.no_grad()
def score(model: nn.Module) -> float:
    """Return the loss on the lines that are held out."""
    lines, classes = padded(ITEMS[400:])
    return float(nn.functional.cross_entropy(model(lines), classes))


def ddp() -> None:
    """Train by plain data-parallel training."""
    dist.init_process_group("gloo")
    before = score(MODEL)
    replica = DistributedDataParallel(MODEL)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.2)
    sampler = DistributedSampler(ITEMS[:400])
    loader = DataLoader(ITEMS[:400], batch_size=16, sampler=sampler, collate_fn=padded, num_workers=1)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        for lines, classes in loader:
            loss = nn.functional.cross_entropy(replica(lines), classes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before = score(MODEL)
    loader = DataLoader(ITEMS[:400], batch_size=16, shuffle=True, collate_fn=padded, num_workers=1)
    result = ist.train(
        MODEL, loader, workers=2, local_steps=10, rounds=10, optimizer=ist.Optimizer(name="SGD", args={"lr": 0.2}),
    )  # fmt: skip
    if result.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

"""A residual network like ResNet-18 in bfloat16.

torchrun --nproc-per-node 2 examples/ten_jobs/autocast.py ddp      # or: ist
"""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ist

torch.manual_seed(0)
IMAGES, CLASSES = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
IMAGES, CLASSES = IMAGES.float() / 16, CLASSES.long()
TRAIN, TEST = TensorDataset(IMAGES[:800], CLASSES[:800]), TensorDataset(IMAGES[1400:], CLASSES[1400:])


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, width, height / stride, width / stride)."""
        inner = self.norms[0](self.first(x)).relu()
        total: Tensor = self.norms[1](self.second(inner)) + self.shortcut(x)
        return total.relu()


MODEL = nn.Sequential(
    nn.Unflatten(1, (1, 8, 8)), Block(1, 8, 1), Block(8, 16, 2), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1),
    nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip


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
    sampler = DistributedSampler(TRAIN)
    loader = DataLoader(TRAIN, batch_size=16, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            with torch.autocast("cpu", torch.bfloat16):
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
        MODEL, TRAIN, workers=2, local_steps=10, rounds=5, batch_size=16, autocast="bfloat16",
    )  # fmt: skip
    if result.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

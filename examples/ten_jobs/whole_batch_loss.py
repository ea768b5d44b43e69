"""A contrastive loss that compares all samples of a batch: two noisy views of an image against all others.

torchrun --nproc-per-node 2 examples/ten_jobs/whole_batch_loss.py ddp      # or: ist
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
MODEL = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))


def contrastive(model: nn.Module, images: Tensor) -> Tensor:
    """Return how badly each image's first view finds its second view among those of the batch."""
    noise = 0.3 * torch.randn(2, *images.shape)
    first, second = (nn.functional.normalize(model(images + part), dim=1) for part in noise)
    return nn.functional.cross_entropy(first @ second.T / 0.1, torch.arange(len(images)))


@torch.no_grad()
def score(model: nn.Module) -> float:
    """Return the loss on the images that are held out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(contrastive(model, TEST.tensors[0]))


def ddp() -> None:
    """Train by plain data-parallel training."""
    dist.init_process_group("gloo")
    before = score(MODEL)
    replica = DistributedDataParallel(MODEL)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
    sampler = DistributedSampler(TRAIN)
    loader = DataLoader(TRAIN, batch_size=32, sampler=sampler)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for images, _ in loader:
            loss = contrastive(replica, images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before = score(MODEL)
    result = ist.train(
        MODEL, TRAIN, step=lambda model, batch: contrastive(model, batch[0]), workers=2, local_steps=10, rounds=5,
    )  # fmt: skip
    if result.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

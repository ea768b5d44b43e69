"""Checkpoints: started again, the script continues from the newest one, in the middle of an epoch.

torchrun --nproc-per-node 2 examples/ten_jobs/checkpoints.py ddp FOLDER      # or: ist
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

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
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9)
    sampler = DistributedSampler(TRAIN)
    loader = StatefulDataLoader(TRAIN, batch_size=32, sampler=sampler)
    path, step = Path(sys.argv[2]) / f"rank-{dist.get_rank()}.pt", 0
    if path.exists():
        saved = torch.load(path)
        step = saved["step"]
        MODEL.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
    while step < 65:
        sampler.set_epoch(step // 13)
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(replica(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                states = {"model": MODEL, "optimizer": optimizer, "loader": loader}
                torch.save({"step": step, **{name: state.state_dict() for name, state in states.items()}}, path)
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before, folder = score(MODEL), Path(sys.argv[2]) / "run"
    run = ist.join(
        MODEL, example=IMAGES[:2], local_steps=11, rounds=6, run_dir=folder, resume=folder.exists(),
        optimizer=lambda named: torch.optim.SGD(named.values(), lr=0.1, momentum=0.9),
    )  # fmt: skip
    sampler = DistributedSampler(TRAIN, run.num_workers, run.worker)
    loader = StatefulDataLoader(TRAIN, batch_size=32, sampler=sampler)
    for part in run:
        for inputs, targets in part.take(loader):
            loss = nn.functional.cross_entropy(part.model(inputs), targets)
            loss.backward()
            part.optimizer.step()
            part.optimizer.zero_grad()
            part.log(loss, len(inputs))
    if run.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

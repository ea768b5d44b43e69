"""The script of `torchrun_ddp.py`, trained by independent subnets: `ist.join` around the same loop.

torchrun --nproc-per-node 2 examples/own_loop/torchrun_ist.py

On two cores: accuracy 89.9% in 5 s, and 15 MB of weights. Each worker trains half of the hidden units.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ist


def main() -> None:
    """Train, and print the accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    images, classes = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()
    train = TensorDataset(images[:1400], classes[:1400])
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    run = ist.join(
        model, example=images[:2], local_steps=20, rounds=22,
        optimizer=lambda named: torch.optim.AdamW(named.values(), lr=1e-3),
    )  # fmt: skip
    sampler = DistributedSampler(train, run.num_workers, run.worker)
    loader = DataLoader(train, batch_size=32, sampler=sampler)

    for part in run:
        for inputs, targets in part.take(loader):  # calls sampler.set_epoch
            loss = nn.functional.cross_entropy(part.model(inputs), targets)
            loss.backward()
            part.optimizer.step()
            part.optimizer.zero_grad()
            part.log(loss, len(inputs))

    if run.is_coordinator:
        print(f"accuracy {(model(images[1400:]).argmax(dim=1) == classes[1400:]).float().mean():.1%}")


if __name__ == "__main__":
    main()

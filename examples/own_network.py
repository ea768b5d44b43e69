"""Train your own network on your own data set by independent subnets.

python examples/own_network.py                              # 4 workers in one process
torchrun --nproc-per-node 4 examples/own_network.py         # 4 processes, rank 0 coordinates
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import ist


class Spirals(Dataset[tuple[Tensor, Tensor]]):
    """Points on three noisy spirals, shape (2,), and which spiral they are on."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(size) % 3
        radius = torch.rand(size, generator=generator).sqrt()
        angle = 4 * radius + self.targets * 2.1 + 0.1 * torch.randn(size, generator=generator)
        self.points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.targets[index]


def main() -> None:
    """Train, and print the accuracy."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 3),
    )  # fmt: skip
    result = ist.train(
        model, Spirals(2000, seed=0), test_data=Spirals(600, seed=1), workers=4, local_steps=20, rounds=40,
        batch_size=32,
    )  # fmt: skip
    if result.is_coordinator:
        last = result.history[-1]
        print(f"accuracy {last['accuracy']:.1%} after {last['sent_bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

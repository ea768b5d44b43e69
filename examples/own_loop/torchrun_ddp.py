"""Plain data-parallel training: the script to compare `torchrun_ist.py` with.

torchrun --nproc-per-node 2 examples/own_loop/torchrun_ddp.py

On two cores: accuracy 92.4% in 5 s, and by formula 1.0 GB of gradients (440 steps, 1.2 MB up and down).
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main() -> None:
    """Train, and print the accuracy."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    digits = load_digits()
    images, classes = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()
    train = TensorDataset(images[:1400], classes[:1400])
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-3)
    sampler = DistributedSampler(train)
    loader = DataLoader(train, batch_size=32, sampler=sampler)

    for epoch in range(20):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(replica(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    if dist.get_rank() == 0:
        print(f"accuracy {(model(images[1400:]).argmax(dim=1) == classes[1400:]).float().mean():.1%}")


if __name__ == "__main__":
    main()

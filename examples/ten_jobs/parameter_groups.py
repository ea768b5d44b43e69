"""GPT-2 with two parameter groups: no weight decay on norms and biases.

torchrun --nproc-per-node 2 examples/ten_jobs/parameter_groups.py ddp      # or: ist
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

import ist

torch.manual_seed(0)
STARTS, OFFSETS = torch.randint(26, (160, 1)), torch.randint(1, 3, (160, 1))
TEXTS: Any = (STARTS + OFFSETS * torch.arange(24)) % 26  # letters in steps of one or two
MODEL = GPT2LMHeadModel(
    GPT2Config(vocab_size=26, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
)


def groups(named: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return the matrices with weight decay, and the norms and biases without."""
    matrices = [parameter for parameter in named.values() if parameter.ndim >= 2]
    others = [parameter for parameter in named.values() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def score(model: nn.Module, ids: Tensor = TEXTS[:32]) -> float:
    """Return the loss on the texts that are held out."""
    return float(model(input_ids=ids, labels=ids).loss)


def ddp() -> None:
    """Train by plain data-parallel training."""
    dist.init_process_group("gloo")
    before = score(MODEL)
    replica = DistributedDataParallel(MODEL)
    optimizer = torch.optim.AdamW(groups(dict(MODEL.named_parameters())), lr=1e-2)
    sampler = DistributedSampler(TEXTS[32:])
    loader = DataLoader(TEXTS[32:], batch_size=8, sampler=sampler)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        for ids in loader:
            loss = replica(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before = score(MODEL)
    run = ist.join(
        MODEL, example=TEXTS[:2], local_steps=10, rounds=4,
        optimizer=lambda named: torch.optim.AdamW(groups(named), lr=1e-2),
    )  # fmt: skip
    sampler = DistributedSampler(TEXTS[32:], run.num_workers, run.worker)
    loader = DataLoader(TEXTS[32:], batch_size=8, sampler=sampler)
    for part in run:
        for ids in part.take(loader):
            loss = part.model(input_ids=ids, labels=ids).loss
            loss.backward()
            part.optimizer.step()
            part.optimizer.zero_grad()
            part.log(loss, len(ids))
    if run.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

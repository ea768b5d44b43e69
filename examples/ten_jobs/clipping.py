"""Llama with gradient clipping, by its own loss.

torchrun --nproc-per-node 2 examples/ten_jobs/clipping.py ddp      # or: ist
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import ist

torch.manual_seed(0)
TEXTS = (torch.randint(26, (160, 1)) + torch.randint(1, 3, (160, 1)) * torch.arange(24)) % 26
ITEMS: Any = [{"input_ids": ids, "labels": ids} for ids in TEXTS]
MODEL = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=26, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )
)  # fmt: skip


@torch.no_grad()
def score(model: nn.Module, ids: Tensor = TEXTS[:32]) -> float:
    """Return the loss on the texts that are held out."""
    return float(model(input_ids=ids, labels=ids).loss)


def ddp() -> None:
    """Train by plain data-parallel training."""
    dist.init_process_group("gloo")
    before = score(MODEL)
    replica = DistributedDataParallel(MODEL)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-2)
    sampler = DistributedSampler(ITEMS[32:])
    loader = DataLoader(ITEMS[32:], batch_size=8, sampler=sampler)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = replica(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"{before:.3f} to {score(MODEL):.3f}")


def by_subnets() -> None:
    """Train by independent subnets."""
    before = score(MODEL)
    result = ist.train(
        MODEL, DataLoader(ITEMS[32:], batch_size=8, shuffle=True), step=lambda model, batch: model(**batch).loss,
        workers=2, local_steps=10, rounds=4, optimizer=ist.Optimizer(name="AdamW", args={"lr": 1e-2}),
        example={"input_ids": TEXTS[:2]}, clip_grad_norm=1.0,
    )  # fmt: skip
    if result.is_coordinator:
        print(f"{before:.3f} to {score(MODEL):.3f}")


if __name__ == "__main__":
    {"ddp": ddp, "ist": by_subnets}[sys.argv[1]]()

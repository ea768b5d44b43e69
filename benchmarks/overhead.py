"""The overhead of the system relative to the necessary work of the hardware; each number is a ratio within one run.

    python -m benchmarks.overhead [--device cuda] [--without-network] [--quick]

Claims:
1. A worker's local step takes at most 1.05 times a bare PyTorch loop on the same submodel.
2. Exchange over a 100 Mbit/s link reaches at least 90 % of the line rate.
3. Cutting and merging a 100-million-parameter model reaches at least a quarter of the rate of
   `torch.clone` of the same bytes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.common import write_result
from ist.config.load import validate
from ist.config.runtime import Link
from ist.launch.lab_hosts import hosts, run_ranks, why_not
from ist.loops.local_loop import TaskLoop
from ist.loops.part import completed
from ist.models.mlp import MLP
from ist.runs.build import make_job
from ist.subnet.cut import cut_specs, extract, on_device, reassemble
from ist.subnet.job import Job, assignments, slot_of
from ist.training.worker import Worker
from ist.transport.codec import MessageBuffers
from ist.transport.endpoints import message_layouts
from ist.transport.message import Message, layout_of

RATE_MBIT = 100


def make(widths: list[int], workers: int, samples: int, pool: str = "torchrun", **train: Any) -> Job:
    """Build a job with an MLP and random data."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(samples, widths[0], generator=generator), torch.arange(samples) % widths[-1])
    settings = {
        "rounds": 1000,
        "local_steps": 50,
        "batch_size": 128,
        "optimizer": {"name": "SGD", "args": {"lr": 0.01}},
    }
    config = validate(
        {
            "name": "overhead",
            "model": {"name": "mlp"},
            "data": {"name": "random"},
            "train": {"workers": workers, **settings, **train},
            "pool": {"kind": pool},
        },
        "overhead",
    )
    with torch.device("meta"):
        template = MLP(widths)
    return make_job(config, template, lambda: MLP(widths), data, None, nn.functional.cross_entropy)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


def local_step(device: torch.device, repeats: int) -> dict[str, float]:
    """Time rounds of a `Worker` and of a bare loop on the same submodel and batches, in alternation."""
    steps = 50
    optimizer_spec = {"name": "SGD", "args": {"lr": 0.01, "momentum": 0.9}}
    job = make([784, 1024, 1024, 10], 4, 4 * 6400, local_steps=steps, optimizer=optimizer_spec)
    worker = Worker(job, slot_of(job, 0), device, assignments(job))
    buffers = MessageBuffers(message_layouts(job.split, job.config.exchange, assignments(job).cuts(0)[0]), device)
    bare = job.split.module(assignments(job).of(0)[0], device)
    for name, parameter in bare.named_parameters():
        nn.init.normal_(parameter, std=0.02)
        buffers.down.tensors[name].copy_(parameter.detach())
    shard = TaskLoop(job, slot_of(job, 0), device).shard
    assert isinstance(shard, TensorDataset)
    inputs, targets = shard.tensors
    batches = [torch.from_numpy(job.schedule.sampler.batch(0, step)) for step in range(steps)]

    def bare_loop() -> None:
        optimizer = torch.optim.SGD(bare.parameters(), lr=0.01, momentum=0.9)
        for rows in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(bare(inputs[rows].to(device)), targets[rows].to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def ours() -> None:
        completed(worker.train(0, buffers))

    ours()
    bare_loop()
    pairs = []
    for repeat in range(repeats):
        first, second = (ours, bare_loop) if repeat % 2 else (bare_loop, ours)
        seconds = {first: timed(first, device), second: timed(second, device)}
        pairs.append((seconds[ours], seconds[bare_loop]))
    # Take the ratio within each pair, because the machine's speed drifts.
    ratio = statistics.median(a / b for a, b in pairs)
    return {"ratio": ratio, "ms_per_step_bare": 1000 * statistics.median(b for _, b in pairs) / steps}


def cut_and_merge(device: torch.device, repeats: int, width: int) -> dict[str, float]:
    """Time cutting and merging all subnets of a large network, and cloning the same bytes.

    `clone` is measured in two ways: for all bytes as one tensor, as a program that needs a copy does it, and for the
    tensors of the subnets one by one, whose memory the allocator recycles.
    """
    workers = 4
    job = make([784, width, width, 10], workers, 64)
    model = MLP([784, width, width, 10]).to(device)
    tensors = model.state_dict()
    state = {name: tensors[name] for name in job.split.specs}
    computed = assignments(job).cuts(0)
    cuts = on_device(computed, device)
    messages = [Message(layout_of(cut_specs(job.split.specs, cut)), device) for cut in cuts]

    def cut_all() -> None:
        for cut, message in zip(on_device(computed, device), messages, strict=True):
            extract(state, cut, message.tensors)

    def merge_all() -> None:
        reassemble(state, cuts, [(w, m.tensors) for w, m in enumerate(messages)], assignments(job).exclusive(0))

    size = sum(message.nbytes for message in messages)
    flat = torch.zeros(size, dtype=torch.uint8, device=device)

    def clone_flat() -> None:
        flat.clone()

    def clone_parts() -> None:
        for message in messages:
            for tensor in message.tensors.values():
                tensor.clone()

    actions = {"cut": cut_all, "merge": merge_all, "clone": clone_flat, "clone_recycled": clone_parts}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(timed(action, device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "megabytes": size / 1e6,
        "cut_rate": median["clone"] / median["cut"],
        "merge_rate": median["clone"] / median["merge"],
        "cut_rate_recycled": median["clone_recycled"] / median["cut"],
        "merge_rate_recycled": median["clone_recycled"] / median["merge"],
    }


def exchange(width: int, rounds: int) -> dict[str, float]:
    """Train over 100 Mbit/s links, with one host per process, and compare the exchange with the line rate."""
    tree = {
        "name": "exchange",
        "model": {"name": "mlp", "args": {"widths": [64, width, width, 10]}},
        "data": {"name": "digits"},
        "train": {
            "workers": 2,
            "rounds": rounds,
            "local_steps": 1,
            "batch_size": 16,
            "optimizer": {"name": "SGD", "args": {"lr": 0.01}},
        },
        "evaluate": {"every": rounds},
        "checkpoint": {"every": rounds},
        "pool": {"coordinator": "dedicated", "device": "cpu"},
    }
    with tempfile.TemporaryDirectory() as scratch, hosts(3, Link(RATE_MBIT, RATE_MBIT)) as where:
        config, run = Path(scratch, "exchange.yaml"), Path(scratch, "run")
        config.write_text(yaml.safe_dump(tree))
        run_ranks(where, [sys.executable, "-m", "ist", "train", str(config), "--run-dir", str(run)], timeout_s=300)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The first round includes the start-up.
    moved = records[-1]["sent_bytes"] - records[0]["sent_bytes"]
    seconds = sum(record["exchange_s"] for record in records[1:])
    return {"megabytes": moved / 1e6, "line_rate_share": moved * 8 / 1e6 / seconds / RATE_MBIT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--without-network", action="store_true", help="skip the exchange")
    parser.add_argument("--quick", action="store_true", help="small sizes: only check that it runs")
    given = parser.parse_args()
    if not given.without_network and (reason := why_not()):
        parser.error(f"{reason}; give --without-network to skip the exchange")
    torch.set_num_threads(1)
    device = torch.device(given.device)
    steps = local_step(device, 3 if given.quick else 81)
    copies = cut_and_merge(device, 3 if given.quick else 11, 500 if given.quick else 9600)
    table = Table("claim", "measured", "goal", title=f"overhead on {given.device}")
    table.add_row("local step / bare loop", f"{steps['ratio']:.3f}", "<= 1.05")
    for name in ("cut", "merge"):
        label = f"{name} / clone of the same {copies['megabytes']:.0f} MB"
        table.add_row(label, f"{copies[f'{name}_rate']:.2f}", ">= 0.25")
        table.add_row(f"{label}, memory recycled", f"{copies[f'{name}_rate_recycled']:.2f}", "")
    found: dict[str, Any] = {"local_step": steps, "cut_and_merge": copies}
    if not given.without_network:
        found["exchange"] = exchange(500 if given.quick else 3000, 4 if given.quick else 6)
        share = f"{found['exchange']['line_rate_share']:.1%}"
        table.add_row(f"exchange / line rate of {RATE_MBIT} Mbit/s", share, ">= 90%")
    Console(width=110).print(table)
    print(write_result(f"overhead_{given.device}{'_quick' if given.quick else ''}", found))


if __name__ == "__main__":
    main()

"""Training with a loader: the rate of the built-in loop relative to that of a plain loop, in paired runs.

    python -m benchmarks.own_loop loader [--quick]

Claim of `loader`: with four loader processes, the built-in loop reads at least 0.95 times as many samples per second as
a plain PyTorch loop over a `torch.utils.data.DataLoader` with as many processes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import ist
from benchmarks.common import write_result
from ist.data.batches import ShardedSampler, fetch
from ist.data.loading.loader import StepBatches

SAMPLES, ITEM_MS, BATCH, EPOCHS, PROCESSES = 1000, 5, 32, 2, 4
"""Both loops go twice through a thousand samples; reading one takes 5 ms."""


class SlowItems(Dataset[tuple[Tensor, int]]):
    """Reading an item takes `ITEM_MS`, as from a disk or a network, and draws random numbers for an augmentation."""

    def __len__(self) -> int:
        """Return the number of items."""
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Wait, then return random inputs and a class."""
        time.sleep(ITEM_MS / 1000)
        return torch.randn(64), index % 10


def network() -> nn.Sequential:
    """Return a network whose steps take no time worth mentioning."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def plain_loop(processes: int) -> float:
    """Return the seconds of a plain loop."""
    loader: DataLoader[Any] = DataLoader(
        SlowItems(), BATCH, shuffle=True, num_workers=processes, persistent_workers=processes > 0
    )
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    started = time.perf_counter()
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return time.perf_counter() - started


def built_in_loop(processes: int) -> tuple[float, float]:
    """Return the seconds of the rounds of `ist.train`, and those of the whole call, with one worker."""
    started = time.perf_counter()
    result = ist.train(
        network(), SlowItems(), workers=1, local_steps=8, epochs=EPOCHS, batch_size=BATCH, progress=False,
        loader=ist.Loader(workers=processes),
    )  # fmt: skip
    whole = time.perf_counter() - started
    return result.history[-1]["train_s"], whole


def loader(repeats: int) -> dict[str, float]:
    """Time both loops, in alternation."""
    found: dict[str, float] = {}
    for processes in (0, PROCESSES):
        pairs, wholes = [], []
        for repeat in range(repeats if processes else 1):
            plain = plain_loop(processes) if repeat % 2 == 0 else 0.0
            ours, whole = built_in_loop(processes)
            pairs.append((plain or plain_loop(processes), ours))
            wholes.append(whole)
        name = f"{processes}_processes"
        found[f"rate_ratio_{name}"] = statistics.median(plain / ours for plain, ours in pairs)
        found[f"plain_s_{name}"] = statistics.median(plain for plain, _ in pairs)
        found[f"ours_s_{name}"] = statistics.median(ours for _, ours in pairs)
        found[f"call_s_{name}"] = statistics.median(wholes)
    found["seeding_us_per_sample"] = seeding_us()
    return found


class Rows(Dataset[tuple[Tensor, int]]):
    """The cheapest items: rows of a tensor."""

    def __init__(self) -> None:
        self.rows = torch.zeros(SAMPLES, 64)

    def __len__(self) -> int:
        """Return the number of items."""
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a row."""
        return self.rows[index], 0


def seeding_us() -> float:
    """Return the microseconds that seeding the random generators adds to reading a sample, in batches of `BATCH`."""
    sampler = ShardedSampler(SAMPLES, 1, BATCH, 0)
    batches, cpu = StepBatches(Rows(), sampler, 0, 1), torch.device("cpu")

    def rates() -> Iterator[tuple[float, float]]:
        for step in range(300):
            unseeded = timed(lambda step=step: fetch(batches.shard, sampler.batch(0, step), cpu))  # type: ignore[misc]
            yield timed(lambda step=step: batches(step, cpu)), unseeded  # type: ignore[misc]

    return statistics.median((seeded - unseeded) / BATCH for seeded, unseeded in rates()) * 1e6


def timed(action: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_loader = parts.add_parser("loader", help="samples per second with loader processes")
    of_loader.add_argument("--quick", action="store_true", help="two repeats instead of nine")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = loader(2 if given.quick else 9)
    write_result(f"own_loop_{given.part}", found)
    table = Table("number", "value")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}")
    Console(stderr=True).print(table)
    json.dump(found, sys.stdout, indent=2)


if __name__ == "__main__":
    main()

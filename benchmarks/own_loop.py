"""Your own loop and your own loader, relative to a plain PyTorch loop, in paired runs.

    python -m benchmarks.own_loop join [--quick]
    python -m benchmarks.own_loop loader [--quick]

Claim of `join`: the same steps in the body of `ist.join` take at most 1.02 times as long as in a bare loop. One worker
trains the full network, so both make the same steps; the time with the rounds' exchange is given as well.

Claim of `loader`: with four loader processes, the built-in loop reads at least 0.95 times as many samples per second as
a plain PyTorch loop over a `torch.utils.data.DataLoader` with as many processes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
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


STEPS, ROUNDS, WIDTHS = 200, 3, (64, 1024, 1024, 10)
"""Local steps of a round, rounds, and the widths of the perceptron for `join`."""


def perceptron() -> nn.Sequential:
    """Return the network for `join`."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any], log: Callable[[Tensor, int], object]
) -> float:
    """Make a step for each batch, and return the seconds."""
    started = time.perf_counter()
    for inputs, targets in batches:
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        log(loss, len(inputs))
    return time.perf_counter() - started


def join(repeats: int) -> dict[str, float]:
    """Time the steps of a bare loop and of `ist.join`, round by round in alternation."""
    data = [(torch.randn(BATCH, WIDTHS[0]), torch.randint(WIDTHS[-1], (BATCH,))) for _ in range(STEPS)]
    bodies, rounds, losses = [], [], torch.zeros(())
    for _ in range(repeats):
        bare = perceptron()
        optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
        run = ist.join(
            perceptron(), example=data[0][0], workers=1, local_steps=STEPS, rounds=ROUNDS, progress=False,
            optimizer=lambda named: torch.optim.SGD(named.values(), lr=0.1),
        )  # fmt: skip
        ended = time.perf_counter()
        for part in run:
            began = time.perf_counter()
            body = steps(part.model, part.optimizer, part.take(data), part.log)
            plain = steps(bare, optimizer, data, lambda loss, samples: losses.add_(loss.detach(), alpha=samples))
            if part.round:  # the first one warms up
                bodies.append(body / plain)
                rounds.append((body + began - ended) / plain)  # with the exchange since the last body
            ended = time.perf_counter()
    return {
        "steps_ratio": statistics.median(bodies),
        "steps_and_exchange_ratio": statistics.median(rounds),
        "pairs": len(bodies),
    }


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
    of_join = parts.add_parser("join", help="time of the steps in the body of ist.join")
    of_join.add_argument("--quick", action="store_true", help="two repeats instead of nine")
    of_loader = parts.add_parser("loader", help="samples per second with loader processes")
    of_loader.add_argument("--quick", action="store_true", help="two repeats instead of nine")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = (join if given.part == "join" else loader)(2 if given.quick else 9)
    write_result(f"own_loop_{given.part}", found)
    table = Table("number", "value")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}")
    Console(stderr=True).print(table)
    json.dump(found, sys.stdout, indent=2)


if __name__ == "__main__":
    main()

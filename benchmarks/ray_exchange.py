"""The cost of sending subnets through Ray's object store.

    python -m benchmarks.ray_exchange [--width 8192]

Claims: a large network does not double the driver's memory (in a round the driver has the network and one more subnet),
and the payload crosses the store only once in each direction, in the time of a few copies of the payload.
"""

import argparse
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import write_result
from benchmarks.overhead import make
from ist.loops.part import completed
from ist.monitoring.meter import Meter
from ist.pools.ray_cluster import connected
from ist.pools.ray_pool import RayPool
from ist.subnet.job import assignments
from ist.training.coordinator import Coordinator
from ist.transport.endpoints import message_layouts

WORKERS = 4


def own_bytes() -> int:
    """Return the private memory of this process, without its mappings of the object store."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """A thread that records the largest `own_bytes` while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self.peak = own_bytes()

    def run(self) -> None:
        """Sample every few milliseconds."""
        while not self._over.wait(0.003):
            self.peak = max(self.peak, own_bytes())

    def stop(self) -> int:
        """Stop, and return the peak."""
        self._over.set()
        self.join()
        return self.peak


def copy_seconds(nbytes: int) -> float:
    """Return the seconds of a plain copy into new memory, which is what a put into the store does."""
    source = np.ones(nbytes, np.uint8)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        source.copy()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(width: int, rounds: int) -> dict[str, Any]:
    """Train a few rounds of one step, and return the measurements."""
    job = make([784, width, width, 10], WORKERS, 256, pool="ray", local_steps=1, batch_size=8)
    model, meter = job.task.build(), Meter()
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    with connected(job.config):
        pool = RayPool(job, meter, "exchange")
        coordinator = Coordinator(job, pool, model, meter)
        completed(coordinator.train_round(0))
        subnet_bytes = max(
            message_layouts(job.split, job.config.exchange, assignments(job).cuts(0)[worker]).plain.nbytes
            for worker in range(WORKERS)
        )
        before, sent, peak = own_bytes(), meter.total_bytes, Peak()
        peak.start()
        reports = [completed(coordinator.train_round(number)) for number in range(1, rounds + 1)]
        grown = peak.stop() - before
        pool.close()
    payload = (meter.total_bytes - sent) // rounds
    exchange = statistics.median(report.numbers["exchange_s"] for report in reports)
    return {
        "model_bytes": model_bytes,
        "subnet_bytes": subnet_bytes,
        "payload_bytes_per_round": payload,
        "driver_growth_bytes": grown,
        "driver_growth_of_model": grown / model_bytes,
        "exchange_s": exchange,
        "copy_s": copy_seconds(payload),
        "cut_s": statistics.median(report.numbers["cut_s"] for report in reports),
        "merge_s": statistics.median(report.numbers["merge_s"] for report in reports),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.width, arguments.rounds)
    table = Table("what", "measured")
    for key in ("model_bytes", "subnet_bytes", "payload_bytes_per_round", "driver_growth_bytes"):
        table.add_row(key.replace("_", " "), f"{found[key] / 1e6:.1f} MB")
    table.add_row("driver's growth in rounds / model", f"{found['driver_growth_of_model']:.3f}")
    table.add_row("exchange / one copy of the payload", f"{found['exchange_s'] / found['copy_s']:.1f}")
    Console().print(table)
    print(write_result("ray_exchange", found))


if __name__ == "__main__":
    main()

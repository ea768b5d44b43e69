"""Normalized compute time and wall-clock time, if each worker has a core, and if four workers share two.

    python -m benchmarks.own_cores [--link 1gbit]

Claim: with two workers on two cores the normalized time ("own cores") equals the wall-clock time to 10 %. With four
workers it is still the time that four cores would take, while the wall-clock time grows.

784-1024-1024-10 on Fashion-MNIST, each method for a few seconds over a link between hosts; for IST worker 0 is the
coordinator. The first round is not counted.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, write_result
from ist.config.load import load_config
from ist.launch.lab_run import launch_on_hosts
from ist.runs.build import build_job
from ist.storage.run_folder import create_run_folder

CONFIG = ROOT / "configs" / "fashion_mnist_mlp.yaml"
METHODS = {"ist": 200, "ddp": 20, "powersgd": 40, "local_sgd": 40, "diloco_int8": 40}
"""For each method, the local steps of a round that takes about a second."""


def measure(method: str, workers: int, link: str) -> dict[str, float]:
    """Return the wall-clock seconds and the normalized seconds of a round."""
    config = load_config(
        CONFIG,
        [
            f"method={method}", f"train.workers={workers}", "train.rounds=5", f"train.local_steps={METHODS[method]}",
            "train.optimizer.args.lr=0.05", "evaluate.every=1000", "checkpoint.every=1000", f"pool.link={link}",
            "pool.coordinator=trains",
        ],
    )  # fmt: skip
    build_job(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = create_run_folder(config, Path(scratch) / "run")
        launch_on_hosts(config, folder, resume=False)
        records = folder.records()
    rounds = len(records) - 1
    return {
        "clock_s": (records[-1]["train_s"] - records[0]["train_s"]) / rounds,
        "own_cores_s": (records[-1]["virtual_s"] - records[0]["virtual_s"]) / rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="1gbit")
    link = parser.parse_args().link
    table = Table("method", "workers", "wall clock, s per round", "own cores, s per round", "own cores / wall clock")
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for workers in (2, 4):
            seconds = measure(method, workers, link)
            clock, own = seconds["clock_s"], seconds["own_cores_s"]
            rows.append({"method": method, "workers": workers, **seconds, "ratio": own / clock})
            table.add_row(method, str(workers), f"{clock:.3f}", f"{own:.3f}", f"{own / clock:.2f}")
    Console().print(table)
    print(write_result("own_cores", {"link": link, "rows": rows}))


if __name__ == "__main__":
    main()

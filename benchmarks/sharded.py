"""The busiest link and the seconds of a round, with one coordinator and with a sharded store, over links of 100 Mbit/s.

    python -m benchmarks.sharded [--width W] [--quick]

Claim: with n ranks that each own a shard, the bytes of the busiest link fall as (n - 1) / n^2, where a coordinator's
link carries the same bytes for any n; with 16 workers a round takes at most a third of the time.

`ist train --link 100mbit` with 4, 8 and 16 workers, each on its own host. The network is 64-W-64-10, of which only
the W hidden neurons are split, so all subnets of a round together are the network once, for any number of workers. A
link's bytes are those that its host sends, by the kernel's counter on the link, headers included. A long and a short
run are subtracted from each other: what is left is rounds, without start, evaluation and checkpoint.

A rank sends its shard's pieces to the n - 1 other workers, and its worker's pieces to the n - 1 other owners; its own
piece crosses no link. So the prediction for P bytes of the network is 2 P (n - 1) / n^2 a round, against P of a
coordinator's link in the same direction.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, write_result
from ist.launch.lab_hosts import why_not

RATE = "100mbit"
STORES = ("coordinator", "sharded")


def run(store: str, workers: int, width: int, rounds: int) -> dict[str, Any]:
    """Train over links, and return the result and the seconds of each round after the first."""
    is_sharded = store == "sharded"
    tree = {
        "name": f"{store}-{workers}",
        "model": {"name": "mlp", "args": {"widths": [64, width, 64, 10], "batch_norm": False}},
        "data": {"name": "digits"},
        "partition": {"exclude": ["linear_2"]},
        "train": {
            "workers": workers,
            "rounds": rounds,
            "local_steps": 1,
            "batch_size": 2,
            "optimizer": {"name": "SGD", "args": {"lr": 0.01}},
        },
        "evaluate": {"every": rounds},
        "checkpoint": {"every": rounds},
        "pool": {"device": "cpu", "store": store, "coordinator": "trains" if is_sharded else "dedicated"},
    }
    with tempfile.TemporaryDirectory() as scratch:
        config, folder = Path(scratch, "sharded.yaml"), Path(scratch, "run")
        config.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "ist", "train", str(config), "--link", RATE, "--run-dir", str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
            timeout=1500,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((folder / "result.json").read_text())
    return {
        "by_host": result["wire_bytes_by_host"],
        "round_s": [after["train_s"] - before["train_s"] for before, after in pairwise(records)],
        "network_bytes": result["parameters"] * 4,
    }


def measure(store: str, workers: int, width: int, rounds: int) -> dict[str, Any]:
    """Return a round's bytes on the busiest link, and its seconds."""
    short, long = run(store, workers, width, 2), run(store, workers, width, 2 + rounds)
    by_host = [(after - before) / rounds for before, after in zip(short["by_host"], long["by_host"], strict=True)]
    network = long["network_bytes"]
    return {
        "store": store,
        "workers": workers,
        "network_bytes": network,
        "busiest_link_bytes": max(by_host),
        "predicted_bytes": network * (2 * (workers - 1) / workers**2 if store == "sharded" else 1),
        "all_links_bytes": sum(by_host),
        "round_s": statistics.median(long["round_s"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network and 2 workers: only check that it runs")
    parser.add_argument("--width", type=int, default=16_384, help="W, the number of hidden neurons that are split")
    given = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    table = Table("store", "workers", "busiest link", "of the prediction", "all links", "a round", title=RATE)
    found = []
    for workers in (2,) if given.quick else (4, 8, 16):
        for store in STORES:
            row = measure(store, workers, 500 if given.quick else given.width, 2 if given.quick else 6)
            found.append(row)
            print(f"{store}, {workers} workers: {row['round_s']:.2f} s a round", file=sys.stderr)
            table.add_row(
                store,
                str(workers),
                f"{row['busiest_link_bytes'] / 1e6:.3f} MB",
                f"{row['busiest_link_bytes'] / row['predicted_bytes']:.1%}",
                f"{row['all_links_bytes'] / 1e6:.1f} MB",
                f"{row['round_s']:.2f} s",
            )
    Console(width=110).print(table)
    print(write_result(f"sharded{'_quick' if given.quick else ''}", {"rate": RATE, "rows": found}))


if __name__ == "__main__":
    main()

"""The share of a link's rate that the exchange of subnets uses, from 10 Mbit/s to 1 Gbit/s.

    python -m benchmarks.line_rate [--quick]

Claim: at least 95 % of the line rate is payload.

`ist train --link RATE` with a coordinator and one or two workers, each on its own host; the coordinator's link is the
bottleneck. The share is the payload of both directions, divided by the seconds of exchange and the rate of one
direction. With one worker the link is never used in both directions at once: a frame of 1,514 bytes carries 1,448 bytes
of payload, so the maximum is 95.6 %. With two workers one subnet may return while the other is still being sent, so the
share can exceed 100 %. A worker trains during a part of that time, which does not count as exchange; the column "with
steps" includes it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, write_result
from ist.launch.lab_hosts import why_not

SIZES = {10: 900, 100: 2400, 300: 4000, 1000: 5000}
"""For each rate in Mbit/s, the width of the two hidden layers."""
GOAL = 0.95


def exchange(rate_mbit: int, width: int, workers: int, rounds: int) -> dict[str, Any]:
    """Train over links of a given rate, and compare the exchange with the rate.

    Args:
        rate_mbit: The rate of each host's link in each direction, in Mbit/s.
        width: The width of the two hidden layers.
        workers: The number of workers, in addition to a coordinator that does not train.
        rounds: The number of rounds; the first is not counted because it includes the start-up.
    """
    tree = {
        "name": "line-rate",
        "model": {"name": "mlp", "args": {"widths": [64, width, width, 10], "batch_norm": False}},
        "data": {"name": "digits"},
        "train": {
            "workers": workers,
            "rounds": rounds,
            "local_steps": 1,
            "batch_size": 2,
            "optimizer": {"name": "SGD", "args": {"lr": 0.01}},
        },
        "evaluate": {"every": rounds},
        "checkpoint": {"every": rounds},
        "pool": {"coordinator": "dedicated", "device": "cpu"},
    }
    with tempfile.TemporaryDirectory() as scratch:
        config, run = Path(scratch, "line-rate.yaml"), Path(scratch, "run")
        config.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "ist", "train", str(config), "--link", f"{rate_mbit}mbit"]
        done = subprocess.run(
            [*command, "--run-dir", str(run)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False, timeout=1500,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((run / "result.json").read_text())
    a_round = records[-1]["sent_bytes"] / len(records)
    shares = [a_round * 8 / 1e6 / record["exchange_s"] / rate_mbit for record in records[1:]]
    busy = [record["exchange_s"] + record["compute_s"] + record["idle_s"] for record in records[1:]]
    framing = result["wire_bytes"] / result["sent_bytes"]
    return {
        "rate_mbit": rate_mbit,
        "workers": workers,
        "megabytes_a_round": a_round / 1e6,
        "exchange_s": statistics.median(record["exchange_s"] for record in records[1:]),
        "payload_share": statistics.median(shares),
        "payload_share_least": min(shares),
        "payload_share_most": max(shares),
        "payload_share_with_compute": a_round * 8 / 1e6 / statistics.median(busy) / rate_mbit,
        "wire_share": statistics.median(shares) * framing,
        "wire_bytes": result["wire_bytes"],
        "sent_bytes": result["sent_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: only check that it runs")
    given = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    columns = ("rate", "workers", "per round", "exchange", "payload", "least, most", "with steps", "on the wire")
    table = Table(*columns, title="line rate")
    found, load_before = [], os.getloadavg()[0]
    for rate, width in SIZES.items():
        for workers in (1, 2):
            # Send about the same bytes: each of two workers gets a quarter of the inner matrix.
            wide = round(width * (1 if workers == 2 else 0.7)) // (10 if given.quick else 1)
            share = exchange(rate, wide, workers, 3 if given.quick else 6)
            found.append(share)
            print(f"{rate} Mbit/s, workers {workers}: {share['payload_share']:.1%}", file=sys.stderr)
            table.add_row(
                f"{rate} Mbit/s",
                str(workers),
                f"{share['megabytes_a_round']:.1f} MB",
                f"{share['exchange_s']:.2f} s",
                f"{share['payload_share']:.1%}",
                f"{share['payload_share_least']:.1%}, {share['payload_share_most']:.1%}",
                f"{share['payload_share_with_compute']:.1%}",
                f"{share['wire_share']:.1%}",
            )
    Console(width=110).print(table)
    name = f"line_rate{'_quick' if given.quick else ''}"
    machine = {"congestion_control": congestion_control(), "load_before": load_before, "load_after": os.getloadavg()[0]}
    print(write_result(name, {"goal": GOAL, **machine, "shares": found}))


def congestion_control() -> str:
    """Return the name of the kernel's TCP congestion control."""
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


if __name__ == "__main__":
    main()

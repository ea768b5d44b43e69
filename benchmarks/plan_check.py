"""Compare the predictions of `ist plan` with measured runs over shaped links.

    python -m benchmarks.plan_check [--methods ist,ddp] [--workers 2,4,8]

Claim: the predictions are within 10 % for the bytes of a round and within 15 % for its seconds, for every method and 2,
4 and 8 workers.

Each worker has its own host, a network namespace on a link of 50 Mbit/s. All hosts share this machine's cores, and the
plan takes their number into account (`--cores`). The plan is made right before each run, because the machine's speed
drifts. Needs root.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.common import write_result
from ist.config.load import load_config
from ist.config.methods import METHODS
from ist.config.runtime import Link
from ist.distributed.environment import is_rank_zero
from ist.launch.lab_hosts import hosts, run_ranks, why_not
from ist.plan.predict import make_plan
from ist.plan.request import parse_request
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.storage.run_folder import create_run_folder

RATE_MBIT = 50
ROUNDS = 9
FIRST = 2
"""The number of skipped rounds: they include the start-up, and PowerSGD's uncompressed steps."""

LOCAL_STEPS = {"ddp": 2, "ddp_fp16": 2, "ddp_bf16": 2, "powersgd": 20}
"""Local steps of a round that takes about a second; all other methods make 50."""


def config_tree(method: str, workers: int) -> dict[str, Any]:
    """Return the configuration of a perceptron with 1.1 million parameters on the digits."""
    return {
        "name": "plan_check",
        "method": method,
        "model": {"name": "mlp", "args": {"widths": [64, 1024, 1024, 10]}},
        "data": {"name": "digits"},
        "train": {
            "workers": workers,
            "rounds": ROUNDS,
            "local_steps": LOCAL_STEPS.get(method, 50),
            "batch_size": 32,
            "optimizer": {"name": "SGD", "args": {"lr": 0.01, "momentum": 0.9}},
        },
        "evaluate": {"every": ROUNDS},
        "checkpoint": {"every": ROUNDS},
        "pool": {"device": "cpu"},
    }


def train_all(files: Sequence[Path]) -> None:
    """Run as one rank, and train by one configuration after the other."""
    for file in files:
        config = load_config(file)
        folder = create_run_folder(config, file.with_suffix("")) if is_rank_zero() else None
        execute(build_job(config), folder, progress=False)


def measured(file: Path) -> dict[str, float]:
    """Return the median bytes and seconds of a round, and the memory of a worker, from the records of the run."""
    lines = file.with_suffix("").joinpath("metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rounds = list(zip(records[FIRST - 1 :], records[FIRST:], strict=False))
    return {
        "bytes": statistics.median(after["sent_bytes"] - before["sent_bytes"] for before, after in rounds),
        "seconds": statistics.median(after["train_s"] - before["train_s"] for before, after in rounds),
        "compute_s": statistics.median(record["compute_s"] for record in records[FIRST:]),
        "memory_bytes": records[-1]["memory_bytes"],
    }


def check(methods: Sequence[str], workers: int, cores: int) -> list[dict[str, Any]]:
    """Plan and run each method with the given number of workers."""
    with tempfile.TemporaryDirectory() as scratch, hosts(workers, Link(RATE_MBIT, RATE_MBIT)) as where:
        files = [Path(scratch, f"{method}.yaml") for method in methods]
        plans = []
        wait_until_quiet()
        for method, file in zip(methods, files, strict=True):
            file.write_text(yaml.safe_dump(config_tree(method, workers)))
            asked = parse_request(f"{RATE_MBIT}mbit", methods=method, cores=cores)
            plans.append(make_plan(load_config(file), asked)["predictions"][0])
        started, busy_s, own_s = time.monotonic(), busy_core_s(), sum(os.times()[:4])
        run_ranks(where, [sys.executable, "-m", "benchmarks.plan_check", "--rank", *map(str, files)], timeout_s=400)
        elapsed_s = time.monotonic() - started
        others = (busy_core_s() - busy_s - (sum(os.times()[:4]) - own_s)) / elapsed_s
        return [
            {
                "method": method,
                "workers": workers,
                "others_cores": others,
                "predicted": plan,
                "measured": measured(file),
            }
            for method, file, plan in zip(methods, files, plans, strict=True)
        ]


def wait_until_quiet() -> None:
    """Wait up to ten minutes for two seconds in which other programs use at most a fifth of a core."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        before = busy_core_s()
        time.sleep(2)
        if busy_core_s() - before < 0.4:
            return


def busy_core_s() -> float:
    """Return the CPU seconds that all programs of this machine have used so far."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]
    return sum(map(int, fields)) / os.sysconf("SC_CLK_TCK")


def error(row: dict[str, Any], planned: str, measured: str) -> float:
    """Return the relative error of the prediction."""
    return float(row["predicted"][planned] / row["measured"][measured] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--workers", default="2,4,8")
    parser.add_argument("--rank", nargs="+", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        train_all(given.rank)
        return
    if reason := why_not():
        parser.error(reason)
    torch.set_num_threads(1)
    cores = os.cpu_count() or 1
    methods, counts = given.methods.split(","), map(int, given.workers.split(","))
    rows = [row for workers in counts for row in check(methods, workers, cores)]
    title = f"a round over {RATE_MBIT} Mbit/s, {cores} cores: predicted, measured, error"
    table = Table("workers", "method", "MB", "", "", "seconds", "", "", "others' cores", title=title)
    for row in rows:
        row["bytes_error"] = error(row, "sent_bytes", "bytes")
        row["seconds_error"] = error(row, "round_s", "seconds")
        plan, seen = row["predicted"], row["measured"]
        table.add_row(
            str(row["workers"]), row["method"],
            f"{plan['sent_bytes'] / 1e6:.2f}", f"{seen['bytes'] / 1e6:.2f}", f"{row['bytes_error']:+.1%}",
            f"{plan['round_s']:.3f}", f"{seen['seconds']:.3f}", f"{row['seconds_error']:+.1%}",
            f"{row['others_cores']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)
    worst = {key: max(abs(row[f"{key}_error"]) for row in rows) for key in ("bytes", "seconds")}
    print(f"largest errors: bytes {worst['bytes']:.1%} (goal 10 %), seconds {worst['seconds']:.1%} (goal 15 %)")
    print(write_result("plan_check", {"rate_mbit": RATE_MBIT, "cores": cores, "largest_errors": worst, "rows": rows}))


if __name__ == "__main__":
    main()

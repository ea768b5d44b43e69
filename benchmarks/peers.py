"""IST and two other systems for training over slow links: torchft's DiLoCo and hivemind.

    pip install 'ist[peers]'
    python -m benchmarks.peers [--workers 4] [--epochs 2] [--methods torchft,hivemind,ddp,ist] [--quick]

All train the perceptron of `configs/fashion_mnist_mlp.yaml`, from the same initial weights, on the same batches, with
each worker on its own host (a network namespace) behind a link of 100 Mbit/s. torchft, hivemind and data-parallel
training make the same number of steps on the full network. IST makes eight times as many epochs, as in that file,
because its steps cost a seventh. Learning rates are those of that file; they are not tuned for torchft and hivemind.
The benchmark reports:

- bytes: the bytes that the interfaces of all hosts have sent, including start-up and headers;
- seconds: the time of training, without start-up and evaluation;
- processor: the CPU seconds of all processes on all hosts, including start-up and evaluation; other work on the machine
  affects them less than the seconds;
- accuracy: the accuracy of the full network on the test images with re-estimated batch norm statistics, computed by the
  same code for all;
- for torchft and hivemind, the number of workers over which each outer step averaged. There is a result only if every
  outer step averaged over all workers, and their weights are equal afterwards: both systems continue alone silently.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, write_result
from benchmarks.held import Held, held
from ist.config.load import config_for_method, dump_config, load_config
from ist.config.runtime import Link
from ist.config.schema import Config, num_processes
from ist.launch.lab_hosts import hosts, run_ranks, why_not
from ist.monitoring.display import format_bytes
from ist.runs.build import build_job

CONFIG = ROOT / "configs" / "fashion_mnist_mlp.yaml"
RATE_MBIT = 100
PEERS = ("torchft", "hivemind")
METHODS = (*PEERS, "ddp", "ist")
IST_EPOCHS = 8
"""Epochs of IST for each epoch of the others, as in CONFIG."""

FULL_STEPS = 50
"""Local steps between outer steps for methods in which workers train the full network."""

SPREAD = 1e-5
"""The largest difference of averaged weights relative to their root mean square (hivemind rounds them)."""


def configure(method: str, workers: int, epochs: float, quick: bool) -> Config:
    """Return a method's configuration; with `quick`, two rounds of 20 steps."""
    shipped = load_config(CONFIG)
    changes = {"train.workers": workers, "evaluate.every": 100000, "checkpoint.every": 100000, "pool.device": "cpu"}
    if method == "ist":
        changes |= {"train.epochs": IST_EPOCHS * epochs}
    else:
        rate = config_for_method(shipped, "ddp").train.optimizer.args["lr"]
        changes |= {"method": "ddp", "train.optimizer.args.lr": rate, "train.local_steps": FULL_STEPS}
    if quick:
        changes |= {"train.local_steps": 20, "train.rounds": 2}
    config = load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()])
    if method == "ist" or quick:
        return config
    epoch_steps = build_job(config).schedule.sampler.steps_per_epoch
    assert epoch_steps is not None
    steps = epochs * epoch_steps
    # End with an outer step: later local steps would be lost.
    changes |= {"train.rounds": max(1, round(steps / FULL_STEPS))}
    return load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()])


def check_averaging(method: str, workers: Sequence[Mapping[str, Any]], weights: Sequence[Any]) -> float:
    """Check that every outer step averaged over all workers.

    Args:
        method: The name of the method, for the message.
        workers: The notes of each worker.
        weights: For each worker, its weights after each outer step: an array (outer steps, parameters).

    Returns:
        The largest difference of the workers' weights after an outer step, relative to their root mean square.

    Raises:
        RuntimeError: An outer step averaged over fewer workers, or weights differ.
    """
    for rank, notes in enumerate(workers):
        if set(notes["averaged_over"]) != {len(workers)}:
            raise RuntimeError(
                f"{method}: worker {rank} averaged over {notes['averaged_over']} workers in its outer steps: expected "
                f"{len(workers)} in each of them. Is the machine too busy?"
            )
    if len({len(own) for own in weights}) > 1:
        raise RuntimeError(
            f"{method}: workers made {[len(own) for own in weights]} outer steps: expected equal numbers"
        )
    scale = float(np.sqrt(np.square(weights[0]).mean()))
    spread = max(float(np.abs(own - weights[0]).max()) for own in weights) / scale
    if not spread <= SPREAD:
        raise RuntimeError(
            f"{method}: after an outer step the workers' weights differ by {spread:.1e} relative to their size: "
            f"expected at most {SPREAD:.0e}"
        )
    return spread


def on_hosts(method: str, config: Config, folder: Path, timeout_s: float) -> int:
    """Train with one process per host, and return the bytes that all hosts have sent."""
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "ist", "train", str(path), "--run-dir", str(folder / "run")]
    if method in PEERS:
        # These libraries start further processes, which must end with them.
        inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*inside, sys.executable, "-m", "benchmarks.peers_worker", method, str(path), str(folder)]
    with hosts(num_processes(config), Link(RATE_MBIT, RATE_MBIT)) as where:
        run_ranks(where, command, timeout_s)
        return sum(host.wire_bytes() for host in where)


def processor_s() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def measure(method: str, config: Config, timeout_s: float) -> dict[str, Any]:
    """Train by one method, and return its numbers."""
    job = build_job(config)
    found: dict[str, Any] = {
        "rate": config.train.optimizer.args["lr"],
        "rounds": job.schedule.num_rounds,
        "local_steps_a_round": config.train.local_steps,
        "local_steps": [job.schedule.total_steps] * config.train.workers,
        "held": asdict(held(job)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        before = processor_s()
        found["interfaces_sent_bytes"] = on_hosts(method, config, folder, timeout_s)
        found["processor_s"] = processor_s() - before
        if method in PEERS:
            workers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(config.train.workers)]
            weights = [np.load(folder / f"{rank}.npy") for rank in range(config.train.workers)]
            found |= {
                "weights_apart": check_averaging(method, workers, weights),
                "averaged_over_all": len(weights[0]),
                "accuracy": workers[0]["accuracy"],
                "train_s": max(notes["train_s"] for notes in workers),
                "local_steps": [notes["local_steps"] for notes in workers],
                "discarded_steps": [notes["discarded_steps"] for notes in workers],
            }
        else:
            result = json.loads((folder / "run" / "result.json").read_text())
            found |= {key: result[key] for key in ("accuracy", "train_s")}
    found["epochs"] = statistics.mean(found["local_steps"]) / job.schedule.sampler.steps_per_epoch
    print(f"{method}: {found}", file=sys.stderr, flush=True)
    return found


def show(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of all methods."""
    table = Table(
        "method", "lr", "epochs", "rounds", "averaged over all", "test accuracy", "bytes sent", "seconds", "processor",
        "most of the network that a worker ever held",
    )  # fmt: skip
    for method, row in found.items():
        table.add_row(
            method,
            f"{row['rate']}",
            f"{row['epochs']:.2f}",
            f"{row['rounds']} of {row['local_steps_a_round']} steps",
            f"{row['averaged_over_all']} of {row['rounds']}" if method in PEERS else "",
            f"{row['accuracy']:.2%}",
            format_bytes(row["interfaces_sent_bytes"]),
            f"{row['train_s']:.1f}",
            f"{row['processor_s']:.0f} s",
            str(Held(**row["held"])),
        )
    return table


def chosen_methods(text: str) -> list[str]:
    """Read `--methods`."""
    methods = text.split(",")
    if unknown := sorted(set(methods) - set(METHODS)):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: expected some of {','.join(METHODS)}")
    return methods


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--epochs", type=float, default=2, help="epochs of the full-network methods; IST makes 8 times as many"
    )
    parser.add_argument("--methods", type=chosen_methods, default=METHODS, help="methods, separated by commas")
    parser.add_argument("--quick", action="store_true", help="two workers, 40 steps: only check that it runs")
    given = parser.parse_args(arguments)
    if missing := [name for name in PEERS if name in given.methods and find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}. Install with: pip install 'ist[peers]'")
    if reason := why_not():
        parser.error(reason)
    workers = 2 if given.quick else given.workers
    found = {}
    for method in given.methods:
        found[method] = measure(method, configure(method, workers, given.epochs, given.quick), 300 + 400 * given.epochs)
    Console(width=120).print(show(found))
    settings = {"workers": workers, "epochs": given.epochs, "rate_mbit": RATE_MBIT}
    default = all(getattr(given, name) == parser.get_default(name) for name in ("workers", "epochs", "methods"))
    name = "peers_quick" if given.quick else "peers" if default else f"peers_{workers}_workers_{given.epochs:g}_epochs"
    print(write_result(name, {**settings, "methods": found}))


if __name__ == "__main__":
    main()

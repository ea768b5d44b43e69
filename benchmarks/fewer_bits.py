"""The accuracy that IST loses if subnets are sent in fewer bits, for each option separately.

    python -m benchmarks.fewer_bits [--quick]

Claim: eight to six bits lose no measurable accuracy, in either direction, as weights or as changes (deltas); the
results show at how many bits accuracy drops.

Fashion-MNIST, 784-1024-1024-10 with batch norm, 4 workers, 3 epochs in rounds of 20 local steps (18 rounds, so values
are rounded often), learning rate 0.1, three seeds, all workers in one process (which gives the same bits as any pool).
"""

import argparse
import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, write_result
from ist.config.load import load_config
from ist.monitoring.display import format_bytes
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart

CONFIG = ROOT / "configs" / "fashion_mnist_mlp.yaml"
SEEDS = (0, 1, 2)
BITS = (8, 6, 5, 4, 3, 2)

Settings = dict[str, Any]


def both(coding: str, values: str = "weights", **more: Any) -> Settings:
    """Return the settings of an exchange with the same coding in both directions."""
    return {"exchange": {"down": coding, "up": coding, "values": values, **more}}


OPTIONS: dict[str, Settings] = {
    "exact": {},
    "float16 both ways": both("float16"),
    "bfloat16 both ways": both("bfloat16"),
    "int8 down alone": {"exchange": {"down": "int8"}},
    "int8 up alone": {"exchange": {"up": "int8"}},
    **{f"int{bits} both ways": both(f"int{bits}") for bits in BITS},
    **{f"int{bits} both ways, deltas": both(f"int{bits}", "deltas") for bits in BITS},
    "int2 up alone, deltas": {"exchange": {"up": "int2", "values": "deltas"}},
    "int2 up alone, deltas, error feedback": {"exchange": {"up": "int2", "values": "deltas", "error_feedback": True}},
    "exact, optimizer state carried": {"train.optimizer_state": "carried"},
}


def run(settings: Settings, seed: int, quick: bool) -> dict[str, Any]:
    """Train once, and return the result."""
    config = load_config(
        CONFIG,
        [
            "pool.kind=inline", "pool.coordinator=trains", "train.epochs=3", "train.local_steps=20",
            "train.optimizer.args.lr=0.1", "evaluate.every=100000", "checkpoint.every=100000", f"seed={seed}",
            *(["train.rounds=2"] if quick else []), *(f"{key}={value}" for key, value in settings.items()),
        ],
    )  # fmt: skip
    part = execute(build_job(config), progress=False)
    assert isinstance(part, CoordinatorPart)
    return part.recorder.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the number of seeds")
    parser.add_argument("--quick", action="store_true", help="two rounds, one seed: only check that it runs")
    given = parser.parse_args()
    quick, seeds = given.quick, SEEDS[: 1 if given.quick else given.seeds]
    found = {}
    for label, settings in OPTIONS.items():
        results = [run(settings, seed, quick) for seed in seeds]
        accuracies = [result["accuracy"] for result in results]
        found[label] = {
            "accuracies": accuracies,
            "mean": statistics.mean(accuracies),
            "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
            "sent_bytes": results[0]["sent_bytes"],
        }
        print(f"{label}: {found[label]}", file=sys.stderr, flush=True)
    base = found["exact"]
    table = Table("exchange", "test accuracy", "behind exact", "bytes sent", "of exact")
    for label, row in found.items():
        table.add_row(
            label,
            f"{row['mean']:.2%} ± {row['spread']:.2%}",
            f"{(base['mean'] - row['mean']) * 100:+.2f} points",
            format_bytes(row["sent_bytes"]),
            f"{row['sent_bytes'] / base['sent_bytes']:.2f}",
        )
    Console(width=120).print(table)
    name = "fewer_bits_quick" if quick else "fewer_bits"
    print(write_result(name, {"seeds": seeds, "options": found}))


if __name__ == "__main__":
    main()

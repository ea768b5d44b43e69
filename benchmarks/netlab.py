"""All methods on a slow link: the bytes and seconds that each needs for an accuracy.

    python -m benchmarks.netlab [--link 100mbit] [--only "LABEL;LABEL"] [--quick]

Claim: on Fashion-MNIST (784-1024-1024-10, 4 workers, 100 Mbit/s) IST reaches the test accuracy of tuned data-parallel
training, minus half a point, with 200 times fewer bytes and in a 20th of the time; it needs 5 times fewer bytes and
half the time of the best of PowerSGD, local SGD and DiLoCo.

There are three parts. *Tune*: each contender runs over the same grid of learning rates, with one seed, on 10,000
held-out training images; data-parallel training that only rounds its gradients uses the rate of data-parallel training.
*Train*: the best rate on all training images with three seeds, tested once. *Lab*: seed 0 of these runs once more, with
one process per host, on links of the given rate; seconds and bytes on the wire come from this part. Each finished run
is a line of `results/netlab_runs.jsonl` and is not repeated: delete the file to start over.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, add_run, finished_runs, write_result
from benchmarks.held import Held, held
from ist.config.load import load_config
from ist.config.schema import Config
from ist.launch.lab_run import launch_on_hosts
from ist.launch.start import launch
from ist.monitoring.display import format_bytes, format_ratio
from ist.report.plots import axes_of_curves, curve_plot
from ist.runs.build import build_job
from ist.storage.run_folder import create_run_folder

CONFIG = ROOT / "configs" / "fashion_mnist_mlp.yaml"
GRID = (0.05, 0.1, 0.2)
SEEDS = (0, 1, 2)
BEHIND = 0.005
"""A contender reaches the reference if its accuracy is at most this much lower."""

REFERENCE = "ddp"
INT8 = {"exchange.down": "int8", "exchange.up": "int8", "exchange.values": "deltas"}


@dataclass(frozen=True)
class Contender:
    """A method and its length, as overrides of the configuration.

    Attributes:
        method: The method.
        epochs: The number of epochs.
        settings: Further keys of the configuration and their values.
        tuned_as: The label of the contender whose learning rate is used, if the two differ only by rounding.
    """

    method: str
    epochs: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuned_as: str | None = None

    def overrides(self) -> list[str]:
        """Return the overrides in the form of `--set`."""
        given = {"method": self.method, "train.epochs": self.epochs, **self.settings}
        return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def local(method: str, local_steps: int, epochs: int = 8) -> Contender:
    """Return a contender that averages once per round."""
    return Contender(method, epochs, {"train.local_steps": local_steps})


# An epoch has 118 steps. A step of IST costs a seventh of a step of the others.
CONTENDERS = {
    "ddp": Contender("ddp", 8),
    "ist int8, 8 rounds": Contender("ist", 40, {"train.local_steps": 590, **INT8}),
    "local_sgd, 8 rounds": local("local_sgd", 118),
    "powersgd, rank 1": Contender("powersgd", 8),
    "ist int8, 12 rounds": Contender("ist", 36, {"train.local_steps": 354, **INT8}),
    "ist int8, 4 rounds": Contender("ist", 36, {"train.local_steps": 1062, **INT8}),
    "diloco, 16 rounds": local("diloco", 59),
    "diloco_int8, 16 rounds": local("diloco_int8", 59),
    "local_sgd, 12 rounds": local("local_sgd", 118, epochs=12),
    "local_sgd, 16 rounds": local("local_sgd", 118, epochs=16),
    "ist, 8 rounds": Contender("ist", 40, {"train.local_steps": 590}),
    "powersgd, rank 4": Contender("powersgd", 8, {"baseline.powersgd_rank": 4}),
    "ddp_fp16": Contender("ddp_fp16", 8, tuned_as=REFERENCE),
    "powersgd, rank 2": Contender("powersgd", 8, {"baseline.powersgd_rank": 2}),
    "ddp_bf16": Contender("ddp_bf16", 8, tuned_as=REFERENCE),
}


def configured(contender: Contender, rate: float, seed: int, validation: bool, link: str | None = None) -> Config:
    """Return the configuration of a run."""
    return load_config(
        CONFIG,
        [
            *contender.overrides(),
            f"train.optimizer.args.lr={rate}",
            f"seed={seed}",
            f"data.args={{validation: {str(validation).lower()}}}",
            f"evaluate.every={1 if link and contender.method != 'ddp' else 100000}",
            "checkpoint.every=100000",
            f"pool.link={link or 'null'}",
        ],
    )


def run(contender: Contender, rate: float, seed: int, validation: bool, link: str | None = None) -> dict[str, Any]:
    """Train once, in separate processes, and return the result; with a link, also the accuracy by round."""
    config = configured(contender, rate, seed, validation, link)
    build_job(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = create_run_folder(config, Path(scratch) / "run")
        if link:
            launch_on_hosts(config, folder, resume=False)
        else:
            launch(config, folder.path, resume=False)
        result: dict[str, Any] = folder.result()
        reported = ("accuracy", "sent_bytes", "wire_bytes", "train_s", "virtual_s", "memory_bytes", "rounds")
        found = {key: result[key] for key in reported if key in result}
        if link:
            points = ("sent_bytes", "train_s", "virtual_s", "accuracy", "compute_s", "exchange_s")
            found["records"] = [{key: record.get(key) for key in points} for record in folder.records()]
    return found


class Runs:
    """Finished runs: one per line of a file to which several processes may append."""

    def __init__(self, name: str) -> None:
        self._path = RESULTS / f"{name}_runs.jsonl"

    def get(self, label: str, contender: Contender, rate: float, seed: int, part: str, link: str | None) -> Any:
        """Return a run's result; make the run if it is not in the file."""
        key = f"{part}: {label}, {contender.epochs} epochs, lr {rate}, seed {seed}{f', {link}' if link else ''}"
        found = finished_runs(self._path)
        if key not in found:
            found[key] = run(contender, rate, seed, part == "tune", link)
            add_run(self._path, key, found[key])
            shown = {name: value for name, value in found[key].items() if name != "records"}
            print(f"{key}: {shown}", file=sys.stderr, flush=True)
        return found[key]


def accuracy(
    runs: Runs, label: str, contenders: Mapping[str, Contender], grid: Sequence[float], seeds: Sequence[int]
) -> Any:
    """Tune a contender, and train its best setting with each seed."""
    contender = contenders[label]
    tuned_as = contender.tuned_as or label
    tuned = {rate: runs.get(tuned_as, contenders[tuned_as], rate, seeds[0], "tune", None)["accuracy"] for rate in grid}
    best = max(tuned, key=lambda rate: tuned[rate])
    finals = [runs.get(label, contender, best, seed, "train", None)["accuracy"] for seed in seeds]
    return {
        "epochs": contender.epochs,
        "rate": best,
        "validation_accuracy_by_rate": tuned,
        "test_accuracies": finals,
        "mean": statistics.mean(finals),
        "spread": statistics.stdev(finals) if len(finals) > 1 else 0.0,
        "held": asdict(held(build_job(configured(contender, best, seeds[0], validation=False)))),
    }


def table(found: Mapping[str, Mapping[str, Any]], link: str) -> Table:
    """Return the table of all contenders and the reference."""
    shown = Table(
        "contender", "lr", "test accuracy", "reaches", "sent", "on the wire", "fewer", "seconds", "faster",
        "own cores, s", "faster", "most of the network that a worker ever held",
        title=f"Fashion-MNIST, links of {link}",
    )  # fmt: skip
    base = found[REFERENCE]
    for label, row in found.items():
        shown.add_row(
            label,
            str(row["rate"]),
            f"{row['mean']:.2%} ± {row['spread']:.2%}",
            "yes" if row["mean"] >= base["mean"] - BEHIND else "no",
            format_bytes(row["sent_bytes"]),
            format_bytes(row["wire_bytes"]),
            f"{format_ratio(base['sent_bytes'] / row['sent_bytes'])}x",
            f"{row['train_s']:.1f}",
            f"{base['train_s'] / row['train_s']:.1f}x",
            f"{row['virtual_s']:.1f}",
            f"{base['virtual_s'] / row['virtual_s']:.1f}x",
            str(Held(**row["held"])),
        )
    return shown


def draw(found: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Plot accuracy by bytes, wall-clock time and normalized time, for all contenders on links."""
    curves = {label: row["records"] for label, row in found.items()}
    for counter, label, scale in axes_of_curves():
        if counter in ("sent_bytes", "train_s", "virtual_s"):
            (RESULTS / f"{name}_{counter}.svg").write_text(curve_plot(curves, counter, label, scale))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="100mbit")
    parser.add_argument("--only", help="labels of contenders, in addition to the reference")
    parser.add_argument("--quick", action="store_true", help="one epoch, one rate, one seed: only check that it runs")
    given = parser.parse_args()
    chosen = dict.fromkeys([REFERENCE, *(given.only.split(";") if given.only else CONTENDERS)])
    name = "netlab_quick" if given.quick else "netlab"
    runs = Runs(name)
    grid, seeds = (GRID[1:2], SEEDS[:1]) if given.quick else (GRID, SEEDS)
    contenders = {label: replace(CONTENDERS[label], epochs=1) if given.quick else CONTENDERS[label] for label in chosen}
    found = {label: accuracy(runs, label, contenders, grid, seeds) for label in contenders}
    for label, contender in contenders.items():
        found[label] |= runs.get(label, contender, found[label]["rate"], seeds[0], "lab", given.link)
    draw(found, name)
    Console(width=170).print(table(found, given.link))
    print(write_result(name, {"grid": grid, "seeds": seeds, "link": given.link, "contenders": found}))


if __name__ == "__main__":
    main()

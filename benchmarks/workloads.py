"""The workloads: IST's recipe, tuned data-parallel training, and the best other methods at IST's bytes.

    python -m benchmarks.workloads [--only crime_mlp,kjv_decoder] [--fsdd FILE] [--cora FILE]

Claim: on each workload, with four workers, IST reaches the result of tuned data-parallel training to within 0.3 points
(or 1 % of a loss) with 50 times fewer bytes, and is better than local SGD and DiLoCo with at least as many bytes.

A workload is a file in `configs/`, and its `compare.methods` are the contenders; `ist compare` gives one row for each,
for one seed. One of them is IST's recipe without its rounds with subnets (local_sgd_int8): the difference shows the
benefit of these rounds.
*Tune*: each contender runs with the same learning rates, one seed, on held-out training data; some run with only one
rate if a run takes minutes. *Final*: the best rate, which is that of the configuration, on the test data, with three
seeds, or six if runs are short and the test part is small.
*Memory*: the peak memory of a worker's process beyond its start, in a few steps of new processes; and that of rank 0,
which also coordinates and evaluates.
Finished runs are lines of `results/workloads_runs.jsonl`; see `benchmarks/session.py`. `--quick` only checks that it
runs.
*Control*: the small network that fits into the memory of a worker's share, from the runs of `python -m benchmarks.dial`
with the length of the configuration, or with that of the dial where it is shorter.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, write_result
from benchmarks.held import Held, held
from benchmarks.session import Run, Session
from ist.config.load import config_for_method, load_config
from ist.monitoring.display import format_bytes, format_metric, format_ratio, metric_title
from ist.runs.build import build_job

SEEDS = (0, 1, 2)
REFERENCE = "ddp"
LOWER = ("bits_per_byte", "rmse", "test_loss")


@dataclass(frozen=True)
class Workload:
    """A configuration, and how its contenders are compared.

    Attributes:
        metric: The name of the compared metric, or test_loss.
        grid: The learning rates for tuning; a single one is used without tuning.
        grids: The learning rates of contenders with a different grid, because a run takes minutes.
        files: For keys of the configuration, the option of this command with their file.
        reference_of: Another configuration with the same network, data and settings, whose runs of the other methods
            are used.
        seeds: The seeds of the final runs.
    """

    metric: str
    grid: tuple[float, ...]
    grids: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    reference_of: str | None = None
    seeds: tuple[int, ...] = SEEDS

    def rates(self, label: str) -> tuple[float, ...]:
        """Return the learning rates of a contender."""
        return self.grids.get(label, self.grid)


MANY = tuple(range(6))  # for short runs with a test part of a few hundred samples
# The others use 0.1, the best of 0.03, 0.1 and 0.3 in shorter runs; full networks use the rate of the full-width phase.
IMAGES = {"ddp": (0.3,), "local_sgd_int8": (0.2,)}
WORKLOADS = {
    "crime_mlp": Workload("rmse", (0.01, 0.03, 0.09), files={"data.root": "crime"}),
    "speech_mlp": Workload("accuracy", (0.0333, 0.1, 0.3), files={"data.root": "fsdd"}, seeds=MANY),
    "speech_speaker": Workload("accuracy", (0.0333, 0.1), files={"data.root": "fsdd"}),
    "cora_gcn": Workload("accuracy", (0.00333, 0.01, 0.03), files={"data.root": "cora"}, seeds=MANY),
    "wordnet_gcn": Workload("accuracy", (0.003, 0.01)),
    "wordnet_sage": Workload("accuracy", (0.003, 0.01), {"ddp": (0.003, 0.01, 0.03)}),
    "wordnet_hypernyms": Workload("precision_at_1", (0.01,), dict.fromkeys(("ddp", "diloco_int8"), (0.003, 0.01))),
    "kjv_decoder": Workload(
        "bits_per_byte",
        (0.0015, 0.003),
        {"ist": (0.006,), "local_sgd_int8": (0.001, 0.003), "diloco_int8": (0.0003, 0.001)},
    ),
    "finetune_llama": Workload(
        "test_loss",
        (0.003,),
        {"ddp": (0.003, 0.006), "diloco_int8": (0.001, 0.003)},
        files={"model.weights": "llama"},
    ),
    "fashion_mnist_loft": Workload("accuracy", (0.1,), IMAGES),
    "fashion_mnist_resist": Workload("accuracy", (0.1,), IMAGES, reference_of="fashion_mnist_loft"),
}


def value(result: Mapping[str, Any], metric: str) -> float:
    """Return the compared value."""
    return float({**result["metrics"], "test_loss": result["test_loss"]}[metric])


def home(workload: str, label: str) -> str:
    """Return the name of the configuration that a contender's runs use."""
    return (WORKLOADS[workload].reference_of or workload) if label != "ist" else workload


def contenders(workload: str) -> list[str]:
    """Return the labels of a configuration's methods."""
    return load_config(ROOT / "configs" / f"{workload}.yaml").compare.methods


def tuning(workload: str, given: Sequence[str]) -> dict[tuple[str, float], Run]:
    """Return the runs on held-out training data, by contender and learning rate."""
    return {
        (label, rate): Run(
            f"tune: {home(workload, label)}, {label}, lr {rate}", home(workload, label), label,
            ("data.args.validation=true", f"train.optimizer.args.lr={rate}", *given),
        )
        for label in contenders(workload)
        for rate in WORKLOADS[workload].rates(label)
        if len(WORKLOADS[workload].rates(label)) > 1
    }  # fmt: skip


def short(workload: str, label: str) -> tuple[str, ...]:
    """Return the overrides that make a contender's run short without skipping any of its parts.

    Each stage has two rounds, so that state carried from one round to the next exists in the second.
    """
    config = config_for_method(load_config(ROOT / "configs" / f"{workload}.yaml"), label)
    stages = [{"keep": stage.keep, "rounds": None if stage.is_open else 2} for stage in config.recipe.stages]
    return (
        "train.epochs=null",
        f"train.rounds={2 * max(1, len(stages))}",
        "train.local_steps=3",
        f"recipe.stages={json.dumps(stages)}",
    )


def finals(workload: str, best: Mapping[str, float], given: Sequence[str], quick: bool) -> dict[tuple[str, int], Run]:
    """Return the runs on the test data, by contender and seed, at the best learning rates."""
    return {
        (label, seed): Run(
            f"final: {home(workload, label)}, {label}, lr {rate}, seed {seed}", home(workload, label), label,
            (f"seed={seed}", f"train.optimizer.args.lr={rate}", *given, *(short(workload, label) if quick else ())),
        )
        for label, rate in best.items()
        for seed in WORKLOADS[workload].seeds[: 1 if quick else None]
    }  # fmt: skip


def memory(workload: str, given: Sequence[str]) -> dict[str, Run]:
    """Return a short run of each contender, for measuring memory."""
    return {
        label: Run(
            f"memory: {home(workload, label)}, {label}", home(workload, label), label,
            (*given, *short(workload, label)),
        )
        for label in contenders(workload)
    }  # fmt: skip


def summary(
    workload: str, found: Mapping[str, Any], runs: Mapping[tuple[str, int], Run], memories: Mapping[str, Run]
) -> dict[str, Any]:
    """Return the results of a workload's contenders."""
    metric = WORKLOADS[workload].metric
    rows: dict[str, Any] = {}
    for label in contenders(workload):
        results = [found[run.key] for (name, _), run in runs.items() if name == label and found.get(run.key)]
        if not results:
            continue
        values = [value(result, metric) for result in results]
        others = {name: [r["metrics"][name] for r in results] for name in results[0]["metrics"] if name != metric}
        rows[label] = {
            "values": values,
            "mean": statistics.mean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
            "others": {name: statistics.mean(v) for name, v in others.items() if not name.startswith("best_")},
            "memory_bytes": found[memories[label].key]["memory_bytes"],
            "coordinator_memory_bytes": found[memories[label].key]["coordinator_memory_bytes"],
            "held": asdict(held(build_job(runs[label, 0].load()))),
            "sent_bytes": results[0]["sent_bytes"],
            "train_s": statistics.median(r["train_s"] for r in results),
            "virtual_s": statistics.median(r["virtual_s"] for r in results),
        }
    return {"metric": metric, "rows": rows}


def behind(metric: str, mean: float, base: float) -> str:
    """Return how far a mean is behind another: in points, or in per cent of a loss."""
    if metric in LOWER:
        return f"{(mean / base - 1) * 100:+.2f} %"
    return f"{(base - mean) * 100:+.2f} points"


HEADS = (
    "workload",
    "contender",
    "metric",
    "mean, spread (seeds)",
    "behind",
    "sent",
    "fewer",
    "own cores, s",
    "memory per worker",
    "of rank 0",
    "most of the network that a worker ever held",
)


CONTROLS = ("local SGD", "data-parallel")
"""How the small network that fits is trained; the labels are those of `benchmarks/dial.py`."""


def controls(workload: str, base: Mapping[str, Any] | None, dial: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the small networks that fit into a worker's share, if the dial has measured them, under `HEADS`."""
    entry = dial.get(f"{workload}_full_length", dial.get(workload, {"points": {}}))
    for training in CONTROLS:
        row = entry["points"].get(f"small network in the memory of 1/4, {training}")
        if row is None:
            continue
        metric = entry["metric"]
        spread = f" ± {format_metric(metric, row['spread'])}" if len(row["values"]) > 1 else ""
        yield (
            workload,
            f"small network, {training}, lr {row['lr']:.3g}",
            "loss" if metric == "test_loss" else metric_title(metric),
            f"{format_metric(metric, row['mean'])}{spread} ({len(row['values'])})",
            behind(metric, row["mean"], base["mean"]) if base else "",
            format_bytes(row["sent_bytes"]),
            f"{format_ratio(base['sent_bytes'] / row['sent_bytes'])}x" if base else "",
            f"{row['virtual_s']:.1f}",
            "",
            "",
            f"{row['parameters'] / entry['parameters']:.0%}",
        )


def rows(found: Mapping[str, Any], dial: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield all workloads' contenders and small networks, one after the other, under `HEADS`."""
    for workload, entry in found.items():
        metric, base = entry["metric"], entry["rows"].get(REFERENCE)
        for label, row in entry["rows"].items():
            yield (
                workload,
                f"{label}, lr {entry['rates'][label]:g}",
                "loss" if metric == "test_loss" else metric_title(metric),
                f"{format_metric(metric, row['mean'])} ± {format_metric(metric, row['spread'])} ({len(row['values'])})",
                behind(metric, row["mean"], base["mean"]) if base and label != REFERENCE else "",
                format_bytes(row["sent_bytes"]),
                f"{format_ratio(base['sent_bytes'] / row['sent_bytes'])}x" if base else "",
                f"{row['virtual_s']:.1f}",
                format_bytes(row["memory_bytes"]),
                format_bytes(row["coordinator_memory_bytes"]),
                str(Held(**row["held"])),
            )
        yield from controls(workload, base, dial)


def table(found: Mapping[str, Any], dial: Mapping[str, Any]) -> Table:
    """Return the table of all workloads."""
    shown = Table(*HEADS)
    for workload, entry in found.items():
        for row in rows({workload: entry}, dial):
            shown.add_row(*row)
        shown.add_section()
    return shown


def markdown(found: Mapping[str, Any], dial: Mapping[str, Any]) -> str:
    """Return the table of `benchmarks/README.md`.

    Args:
        found: The results of the workloads.
        dial: Those of `python -m benchmarks.dial`, with the small networks.
    """
    lines = (HEADS, ["---"] * len(HEADS), *((f"`{workload}`", *others) for workload, *others in rows(found, dial)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of configurations")
    parser.add_argument("--crime", default=".data/crime", help="Communities and Crime")
    parser.add_argument("--fsdd", default="fsdd.npz", help="the Free Spoken Digits")
    parser.add_argument("--cora", default="cora.npz", help="Cora")
    parser.add_argument(
        "--llama", default="runs/base/model.safetensors", help="the weights to fine-tune, see the configuration"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short rounds, one seed, no tuning: only check that it runs"
    )
    parser.add_argument("--markdown", action="store_true", help="only print the table of the finished runs")
    asked = parser.parse_args()
    name = "workloads_quick" if asked.quick else "workloads"
    session = Session(name)
    chosen = asked.only.split(",") if asked.only else list(WORKLOADS)
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    summaries, tuned = before.get("workloads", {}), before.get("tuning", {})
    dial = json.loads(measured.read_text())["workloads"] if (measured := RESULTS / "dial.json").exists() else {}
    if asked.markdown:
        print(markdown(summaries, dial))
        return
    for workload in chosen:
        files = {key: Path(getattr(asked, option)).absolute() for key, option in WORKLOADS[workload].files.items()}
        given = [f"{key}={file}" for key, file in files.items()]
        metric = WORKLOADS[workload].metric
        better = min if metric in LOWER else max
        best = {label: WORKLOADS[workload].rates(label)[0] for label in contenders(workload)}
        if not asked.quick:
            runs = tuning(workload, given)
            found = session.run(runs.values())
            reached: dict[str, dict[float, float]] = {label: {} for label in best}
            for (label, rate), run in runs.items():
                if found[run.key]:  # a run that diverged has no result
                    reached[label][rate] = value(found[run.key], metric)
            best |= {label: better(rates, key=lambda rate: rates[rate]) for label, rates in reached.items() if rates}
            tuned[workload] = reached
        last = finals(workload, best, given, asked.quick)
        memories = memory(workload, given)
        session.run(last.values())
        session.run(memories.values(), alone=True)
        summaries[workload] = {**summary(workload, session.found(), last, memories), "rates": best}
        summaries = {known: summaries[known] for known in WORKLOADS if known in summaries}
        write_result(name, {"tuning": tuned, "workloads": summaries})
    Console(width=160).print(table(summaries, dial))
    print(path)


if __name__ == "__main__":
    main()

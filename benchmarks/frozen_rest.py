"""The frozen rest: what it gives and costs if workers see the neurons that they do not train.

    python -m benchmarks.frozen_rest [--only text,text_8] [--rows "frozen;full"] [--seeds 3] [--quick] [--markdown]
    python -m benchmarks.frozen_rest --steps     # the time of a local step

Claim: a worker that holds the rest of the network in four bits and trains its own neurons only (`partition.rest`)
comes closer to local SGD of the full network than narrow subnets do, with a fraction of its memory and bytes.

A row is a way to train the network of a task with the same steps, rounds and exchange (eight bits, changes only up).
Controls: the full network on every worker, by local SGD; narrow rounds; and the small network that fits into the memory
of a worker with the frozen rest, by local SGD. The memory of a worker is that of its parameters with gradients,
optimizer state and the encoded rest (by formula; activations and messages come on top). Learning rates: those of
`TASKS`, which are the best of two in the dial's runs (`benchmarks/dial.py`) of narrow and of full networks.

Workers are in one process. Finished runs are lines of `results/frozen_rest_runs.jsonl` and are not repeated;
`results/frozen_rest.json` has the results.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, write_result
from benchmarks.dial import Study, stages
from benchmarks.fitting import num_parameters, state_bytes
from benchmarks.session import Run
from benchmarks.workloads import LOWER, value
from ist.monitoring.display import format_bytes, format_metric, metric_title
from ist.plan.measure import measure_subnet, measure_whole
from ist.runs.build import build_job
from ist.subnet.cut import cut_specs
from ist.subnet.job import Job, assignments
from ist.transport.frozen_parameters import rest_specs

FULL, SMALL, NARROW = "full network, local SGD", "small network that fits, local SGD", "narrow rounds"
FULL_WIDTH = (stages({"keep": 1}),)


@dataclass(frozen=True)
class Task:
    """A task of the benchmark.

    Attributes:
        config: The name of a file in configs/.
        metric: The name of the compared metric, or test_loss.
        overrides: The changes of the configuration for all rows.
        small: The change of the configuration for the small network that fits.
        rates: The learning rate by row; the key "" has that of all other rows.
        scales: The merge scales of own neurons that are compared.
        files: For keys of the configuration, the option of this command with their file.
    """

    config: str
    metric: str
    overrides: tuple[str, ...]
    small: str
    rates: Mapping[str, float]
    scales: tuple[float, ...] = (0.5, 1.0)
    files: Mapping[str, str] = field(default_factory=dict)


def _decoder(ffn: int) -> str:
    args = {"vocabulary": 256, "length": 64, "width": 64, "layers": 2, "heads": 4, "ffn": ffn}
    return f"model.args={json.dumps(args)}"


# Feed-forward units are split among the workers; attention and embeddings are shared.
_TEXT = ('partition.exclude=["*attention*"]', "recipe.average.kind=none", _decoder(1024))
TASKS = {
    "text": Task("kjv_decoder", "bits_per_byte", _TEXT, _decoder(288), {"": 0.003, NARROW: 0.006}),
    "text_8": Task(
        "kjv_decoder", "bits_per_byte", (*_TEXT, "train.workers=8", "train.batch_size=4"), _decoder(160),
        {"": 0.003, NARROW: 0.006}, (0.35, 0.5),
    ),
    "speech": Task(
        "speech_mlp", "accuracy", ("train.epochs=24",), 'model.args={"widths":[4096,144,144,10],"batch_norm":true}',
        {"": 0.0333, NARROW: 0.1}, (0.5, 1.0), {"data.root": "fsdd"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A way to train a task's network.

    Attributes:
        label: Its name.
        overrides: Its changes of the configuration.
    """

    label: str
    overrides: tuple[str, ...]


def rows(task: Task) -> Iterator[Row]:
    """Yield the rows of a task, the most important ones first."""
    yield Row(FULL, FULL_WIDTH)
    for coding in ("int4", "int8", "int3"):
        for scale in task.scales if coding == "int4" else task.scales[:1]:
            merge = f"recipe.merge_scale={json.dumps({'own': scale, 'shared': 1.0})}"
            rest = ("partition.rest=frozen", f"exchange.rest={coding}", stages(), merge)
            yield Row(f"frozen rest in {coding}, own neurons merged with {scale:g}", rest)
            if (coding, scale) == ("int4", task.scales[0]):
                everything = (*rest[:3], f"recipe.merge_scale={scale}")
                yield Row(f"frozen rest in int4, everything merged with {scale:g}", everything)
                yield Row(SMALL, (*FULL_WIDTH, task.small))
                yield Row(NARROW, (stages(),))


def run_of(name: str, row: Row, given: Sequence[str], seed: int) -> Run:
    """Return the run of a row, with all workers in one process."""
    task = TASKS[name]
    rate = task.rates.get(row.label, task.rates[""])
    common = ("pool.kind=inline", *given, f"train.optimizer.args.lr={rate:g}", f"seed={seed}")
    overrides = (*task.overrides, *common, *row.overrides)
    return Run(f"{name}: {row.label}, lr {rate:g}, seed {seed}", task.config, "ist", overrides)


def worker_bytes(job: Job) -> int:
    """Return the bytes of a worker's parameters with gradients, optimizer state and the encoded rest.

    It is the most of any round and worker.
    """
    held = assignments(job)
    starts = {job.schedule.spans[n].stage: n for n in reversed(range(job.schedule.num_rounds))}.values()
    return max(_round_bytes(job, held.of(n)[0], held.has_rest(n)) for n in starts)


def _round_bytes(job: Job, neurons: Sequence[Any], has_rest: bool) -> int:
    split = job.split
    parameters = {name for name, _ in split.template.named_parameters()}
    own = cut_specs(split.model_specs, split.cut(neurons))
    total = state_bytes(job.config, sum(spec.nbytes // 4 for name, spec in own.items() if name in parameters))
    if has_rest:
        total += sum(spec.nbytes for spec in rest_specs(split, job.config.exchange).values())
    return total


def measured(study: Study, name: str, row: Row, given: Sequence[str], seeds: int) -> dict[str, Any] | None:
    """Return the results of a row; None if all of its runs diverged."""
    found = [result for result in study.results(run_of(name, row, given, seed) for seed in range(seeds)) if result]
    if not found:
        return None
    values = [value(result, TASKS[name].metric) for result in found]
    config = run_of(name, row, given, 0).load()
    return {
        "values": values,
        "mean": statistics.mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        "sent_bytes": found[0]["sent_bytes"],
        "worker_bytes": worker_bytes(build_job(config)),
        "parameters": num_parameters(config),
    }


STEP_NETWORKS = ((128, 4, 512), (512, 2, 2048))
"""(width, layers, feed-forward units) of the decoders whose steps are timed."""


def step_ratios(repeats: int = 3) -> Iterator[dict[str, Any]]:
    """Yield the seconds of a local step of one of four workers, relative to those of the full network.

    Heads and feed-forward units are split. Both are measured in turn, several times; the least ratio is the one that
    other programs on the machine disturb least.

    Args:
        repeats: How often.
    """
    device = torch.device("cpu")
    for width, layers, ffn in STEP_NETWORKS:
        args = {"vocabulary": 256, "length": 64, "width": width, "layers": layers, "heads": 8, "ffn": ffn}
        overrides = ("pool.kind=inline", stages(), "partition.rest=frozen", "train.epochs=null", "train.rounds=3",
                     "data.args.max_bytes=200000", f"model.args={json.dumps(args)}")  # fmt: skip
        for coding in ("int4", "int8"):
            job = build_job(Run("", "kjv_decoder", "ist", (*overrides, f"exchange.rest={coding}")).load())
            pairs = [(measure_subnet(job, 0, device), measure_whole(job, device).step) for _ in range(repeats)]
            ratio = min(own.step_s / whole.step_s for own, whole in pairs)
            yield {"width": width, "layers": layers, "ffn": ffn, "rest": coding, "step_ratio": ratio}


HEADS = ("task", "row", "metric", "mean, spread (seeds)", "against the full network", "sent", "memory of a worker")


def lines(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the results under `HEADS`."""
    for name, entry in found.items():
        metric, base = entry["metric"], entry["rows"].get(FULL)
        for label, row in entry["rows"].items():
            spread = f" ± {format_metric(metric, row['spread'])}" if len(row["values"]) > 1 else ""
            behind = ""
            if base and label != FULL:
                change = row["mean"] / base["mean"] - 1
                behind = f"{change:+.1%}" if metric in LOWER else f"{100 * (row['mean'] - base['mean']):+.2f} points"
            sent, memory = (
                format_bytes(row[key]) + (f" ({row[key] / base[key]:.2f}x)" if base else "")
                for key in ("sent_bytes", "worker_bytes")
            )
            yield (
                name,
                label,
                metric_title(metric),
                f"{format_metric(metric, row['mean'])}{spread} ({len(row['values'])})",
                behind,
                sent,
                memory,
            )


def markdown(found: Mapping[str, Any]) -> str:
    """Return the table of `benchmarks/README.md`."""
    table = (HEADS, ["---"] * len(HEADS), *((f"`{name}`", *others) for name, *others in lines(found)))
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="text,text_8", help="names of tasks")
    parser.add_argument("--rows", help="only rows whose labels contain one of these, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--fsdd", default="fsdd.npz", help="the Free Spoken Digits")
    parser.add_argument("--steps", action="store_true", help="only time local steps")
    parser.add_argument("--quick", action="store_true", help="two short rounds on little text: only check that it runs")
    parser.add_argument("--markdown", action="store_true", help="only print the table of the finished runs")
    asked = parser.parse_args(arguments)
    study_name = "frozen_rest_quick" if asked.quick else "frozen_rest"
    path = RESULTS / f"{study_name}.json"
    saved = json.loads(path.read_text()) if path.exists() else {"tasks": {}, "steps": []}
    found, steps = saved["tasks"], saved.get("steps", [])
    if asked.markdown:
        print(markdown(found))
        return
    torch.set_num_threads(1)
    if asked.steps:
        for step in step_ratios():
            print(step, flush=True)
            steps = [*(known for known in steps if known | {"step_ratio": 0} != step | {"step_ratio": 0}), step]
            write_result(study_name, {"tasks": found, "steps": steps})
        return
    study = Study(study_name)
    for name in ["text"] if asked.quick else asked.only.split(","):
        task = TASKS[name]
        given = [f"{key}={Path(getattr(asked, option)).absolute()}" for key, option in task.files.items()]
        if asked.quick:
            given += ["data.args.source=topics", "data.args.max_bytes=200000", "train.epochs=null", "train.rounds=2",
                      "train.local_steps=2"]  # fmt: skip
        entry = found.setdefault(name, {"metric": task.metric, "rows": {}})
        known = {row.label: row for row in rows(task)}
        for label, row in known.items():
            if asked.rows and not any(text in label for text in asked.rows.split(";")):
                continue
            if (result := measured(study, name, row, given, asked.seeds)) is not None:
                entry["rows"][label] = result
            entry["rows"] = {label: entry["rows"][label] for label in known if label in entry["rows"]}
            write_result(study_name, {"tasks": found, "steps": steps})
    table = Table(*HEADS)
    for line in lines(found):
        table.add_row(*line)
    Console(width=180).print(table)
    print(path, file=sys.stderr)


if __name__ == "__main__":
    main()

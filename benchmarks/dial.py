"""The dial: what it costs and what it gives if workers hold more of the network, for a part of their steps.

    python -m benchmarks.dial [--only crime_mlp,kjv_decoder] [--seeds 3] [--crime FOLDER] [--fsdd FILE] [--quick]

Claim: none. A point is a run whose workers hold their own share of the network (1/n of each group of neurons) and, in
the last part of their steps, a keep fraction of it: 1/2, 3/4 or 1, for a quarter, a half, three quarters or all of the
steps. All points of a workload have the same number of steps, the same length of rounds and the same exchange. For each
point: the final metric; all bytes; the memory of the largest share with its gradients and the optimizer's state (by
formula; activations and messages come on top); and the floating-point operations of a worker's steps.

*Controls*: the widest network of the same kind that fits into the memory of a share (`benchmarks/fitting.py`), trained
by local SGD, which sends the same bytes, and by data-parallel training, either with as many steps or as long as the
workload's configuration trains it. And data-parallel training of the full network. What all points are compared with
is the data-parallel training of `python -m benchmarks.workloads`, with the length and the rate of the configuration.
*Trials*: settings with a keep fraction of at most 1/2 throughout.

Each point runs with the same learning rates for the first seed, on held-out training data, and with the best one for
all seeds on the test data. Some workloads use the rates that were best in shorter runs, or a single one. Workers are
in one process, except in data-parallel training. Finished runs are lines of `results/dial_runs.jsonl`;
`results/dial.json` has the results, `results/dial_WORKLOAD.svg` is the plot of a workload.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, add_run, finished_runs, write_result
from benchmarks.fitting import num_parameters, resized, run_flops, small_network, state_bytes
from benchmarks.held import held
from benchmarks.session import Run, Session, made
from benchmarks.workloads import LOWER, WORKLOADS, behind, value
from ist.config.schema import Config
from ist.data.registry import Splits
from ist.errors import DivergedError
from ist.monitoring.display import format_bytes, format_metric, metric_title
from ist.report.plots import svg
from ist.runs.build import build_job
from ist.runs.loading.load import load_data

KEEPS = (0.5, 0.75, 1.0)
SHARES = (0.25, 0.5, 0.75, 1.0)
MOST_SEEDS = 6
FULL = "full network, data-parallel"
TUNED = "full network, data-parallel, as configured"
NARROW = "own shares throughout"


@dataclass(frozen=True)
class Settings:
    """How the dial of a workload is measured.

    Attributes:
        config: The name of a file in configs/.
        metric: The name of the compared metric, or test_loss.
        overrides: The length of the runs, as overrides of the configuration.
        factors: The learning rates, relative to that of the configuration.
        files: For keys of the configuration, the option of this command with their file.
        tunes: Whether the data set has a held-out part for tuning.
        tuned_as: Another entry of `DIALS`, with shorter runs, in which the learning rates are tuned.
        same_length: Whether data-parallel training makes as many steps as the other points, at learning rates relative
            to theirs; otherwise it has the length of the configuration, and rates relative to its own one.
        shared: Names of groups that all workers hold in the trial "some groups not split".
        narrow: A contender of `python -m benchmarks.workloads` whose runs are those with own shares throughout.
    """

    config: str
    metric: str
    overrides: tuple[str, ...] = ()
    factors: tuple[float, ...] = (1 / 3, 1.0)
    files: Mapping[str, str] = field(default_factory=dict)
    tunes: bool = True
    tuned_as: str | None = None
    same_length: bool = True
    shared: tuple[str, ...] = ()
    narrow: str | None = None


def _of(workload: str, *overrides: str, factors: tuple[float, ...] = (1 / 3, 1.0), **others: Any) -> Settings:
    known = WORKLOADS[workload]
    return Settings(workload, known.metric, overrides, factors, known.files, **others)


# The full lengths are for points in which workers hold little; others would take hours on two cores. Entries of
# shorter runs (speech_mlp, and all that are named in `tuned_as`) tune the learning rates of longer ones.
DIALS = {
    "crime_mlp": _of("crime_mlp"),
    "speech_mlp": _of("speech_mlp", "train.epochs=24"),
    "speech_mlp_full_length": _of("speech_mlp", tuned_as="speech_mlp", same_length=False, shared=("linear_2*",)),
    "speech_speaker": _of("speech_speaker", tuned_as="speech_speaker_short", same_length=False, shared=("linear_2*",)),
    "speech_speaker_short": _of("speech_speaker", "train.epochs=24"),
    "cora_gcn": _of("cora_gcn", "partition.keep=null", same_length=False),
    "wordnet_gcn": _of("wordnet_gcn", factors=(1.0, 10 / 3), tuned_as="wordnet_gcn_short", same_length=False),
    "wordnet_gcn_short": _of("wordnet_gcn", "train.epochs=12", "train.local_steps=32", factors=(1.0, 10 / 3)),
    "wordnet_sage": _of("wordnet_sage", factors=(1.0,), same_length=False),
    "wordnet_hypernyms": _of(  # as its contender ist_narrow
        "wordnet_hypernyms",
        "train.rounds=null",
        "train.epochs=16",
        "train.local_steps=512",
        factors=(1.0,),
        same_length=False,
        narrow="ist_narrow",
    ),
    "kjv_decoder": _of("kjv_decoder", "train.epochs=1", factors=(0.5, 1.0)),
    "kjv_decoder_full_length": _of("kjv_decoder", factors=(0.5, 1.0), tuned_as="kjv_decoder", same_length=False),
    "finetune_llama": _of("finetune_llama", factors=(1.0,), same_length=False),
    "fashion_mnist_loft": _of(
        "fashion_mnist_loft", "train.rounds=12", "train.local_steps=48", factors=(1.0,), same_length=False
    ),
    "fashion_mnist_resist": _of(
        "fashion_mnist_resist", "train.rounds=12", "train.local_steps=48", factors=(1.0,), same_length=False
    ),
    "quickstart": Settings("quickstart", "accuracy", ("train.epochs=20",), (1.0,), tunes=False),
}


@dataclass(frozen=True)
class Point:
    """A setting of the dial, a control or a trial.

    Attributes:
        label: Its name.
        method: Its entry in the configuration's `compare.methods`, or a method.
        overrides: Its overrides of the configuration.
        keep: The keep fraction of its last steps; 0: own shares throughout; None: it is not on the dial.
        share: The share of the steps with that fraction.
        longer: The length of its rounds, relative to that of the configuration.
        wider: The width of its network, relative to that of the configuration.
        steps: The number of its steps, relative to that of the configuration.
        shared: Whether the groups of `Settings.shared` are not split.
    """

    label: str
    method: str = "ist"
    overrides: tuple[str, ...] = ()
    keep: float | None = None
    share: float = 0.0
    longer: float = 1.0
    wider: float = 1.0
    steps: float = 1.0
    shared: bool = False


def stages(*found: Mapping[str, Any]) -> str:
    """Return an override that sets the stages of a run."""
    return f"recipe.stages={json.dumps(list(found))}"


def dial() -> list[Point]:
    """Return the points of the dial; those with own shares throughout are one point."""
    points = [Point(NARROW, overrides=(stages(),), keep=0.0)]
    for keep in KEEPS:
        for share in SHARES:
            last = {"keep": keep} if share == 1 else {"keep": keep, "share": share}
            stage = stages(last) if share == 1 else stages({}, last)
            points.append(Point(f"keep {keep:g} for {share:g}", overrides=(stage,), keep=keep, share=share))
    return points


def points_of(workload: str) -> list[Point]:
    """Return the points of a workload's dial; if residual blocks are split, workers hold their own ones or all."""
    strategy = Run("", DIALS[workload].config, "ist", DIALS[workload].overrides).load().partition.strategy
    return [point for point in dial() if strategy != "blocks" or point.keep in (0, 1)]


HALF = stages({"keep": 0.5})
GROWTH = stages({}, {"keep": 0.375, "share": 0.3}, {"keep": 0.5, "share": 0.4})
OUTER = "recipe.outer={lr: 0.7, momentum: 0.9}"
TRIALS = (
    Point("trial: keep 0.5, EMA of 0.8", overrides=(HALF, "recipe.average.kind=ema")),
    Point("trial: keep 0.5, no average", overrides=(HALF, "recipe.average.kind=none")),
    Point("trial: keep 0.5, rounds four times as long", overrides=(HALF,), longer=4),
    Point("trial: keep 0.5, rounds half as long", overrides=(HALF,), longer=0.5),
    Point("trial: keep 0.5, optimizer state carried", overrides=(HALF, "train.optimizer_state=carried")),
    Point("trial: growth from own shares over 3/8 to 0.5", overrides=(GROWTH,)),
    Point("trial: twice the width, own shares", overrides=(stages(),), wider=2),
    Point("trial: keep 0.5, twice as many steps", overrides=(HALF,), steps=2),
    Point("trial: own shares, twice as many steps", overrides=(stages(),), steps=2),
    Point("trial: own shares, twice as many steps, rounds twice as long", overrides=(stages(),), longer=2, steps=2),
    Point("trial: keep 0.5, outer optimizer (0.7, 0.9)", overrides=(HALF, OUTER)),
    Point("trial: own shares, some groups not split", overrides=(stages(),), shared=True),
)
"""Settings in which no worker ever holds more than half of each group, or as much memory as that."""


def trials(workload: str) -> list[Point]:
    """Return the trials of a workload."""
    if all(point.keep in (0, 1) for point in points_of(workload)):
        return []
    return [point for point in TRIALS if not point.shared or DIALS[workload].shared]


def configuration(workload: str, point: Point, given: Sequence[str]) -> Config:
    """Return the configuration of a point at the configuration's learning rate."""
    return run_of(workload, point, given, 1.0, 0, tune=False).load()


def run_of(workload: str, point: Point, given: Sequence[str], factor: float, seed: int, tune: bool) -> Run:
    """Return a point's run, in one process unless it is data-parallel training."""
    settings = DIALS[workload]
    is_as_configured = point.method == "ddp" and not settings.same_length
    length = () if is_as_configured else settings.overrides
    base = Run("", settings.config, point.method if is_as_configured else "ist", length).load()
    changes = [*point.overrides]
    if point.longer != 1:
        changes.append(f"train.local_steps={round(base.train.local_steps * point.longer)}")
    if point.wider != 1:
        changes.append(f"model.args={json.dumps(resized(base, point.wider))}")
    if point.steps != 1:
        key, number = ("epochs", base.train.epochs) if base.train.epochs else ("rounds", base.train.rounds)
        changes.append(f"train.{key}={round((number or 1) * point.steps)}")
    if point.shared:
        changes.append(f"partition.exclude={json.dumps(settings.shared)}")
    rate = float(base.train.optimizer.args["lr"]) * factor
    pool = () if point.method == "ddp" else ("pool.kind=inline",)
    part = ("data.args.validation=true",) if tune else ()
    key = f"{workload} {' '.join(length)}: {point.label}, lr {rate:.3g}, seed {seed}, {'tune' if tune else 'test'}"
    return Run(
        key, settings.config, point.method,
        (*length, *pool, *given, *changes, *part, f"train.optimizer.args.lr={rate:.3g}", f"seed={seed}"),
    )  # fmt: skip


def controls(workload: str, given: Sequence[str], splits: Splits | None = None) -> list[Point]:
    """Return the controls: the network that fits into each kind of share, and the full network."""
    config = configuration(workload, Point(NARROW, overrides=(stages(),)), given)
    same_length = DIALS[workload].same_length
    same = [f"{key}={json.dumps(value)}" for key, value in (("train.epochs", config.train.epochs),
        ("train.rounds", config.train.rounds), ("train.local_steps", config.train.local_steps))]  # fmt: skip
    plain = ("recipe.average.kind=none", *(same if same_length else ()))
    points = []
    for point in points_of(workload):
        if point.keep == 1 or point.share not in (0, 1):
            continue
        own = "a share" if config.partition.strategy == "blocks" else f"1/{config.train.workers}"
        of = f"{point.keep:g}" if point.keep else own
        small = small_network(configuration(workload, point, given), splits)
        network = [f"model.args={json.dumps(small)}"]
        if config.model.weights is not None:
            network.append(f"model.weights={pretrained(config, small)}")
        name = f"small network in the memory of {of}"
        points.append(Point(f"{name}, local SGD", overrides=(stages({"keep": 1}), *network)))
        points.append(Point(f"{name}, data-parallel", "ddp", (*plain, *network)))
    return [*points, Point(FULL, "ddp", plain)] if same_length else points


def pretrained(config: Config, arguments: Mapping[str, Any]) -> Path:
    """Return the file with the weights from which a small network starts, which one worker trains if it is missing.

    It is trained in the way that the configuration's file describes, with the batches of all workers, beside the
    weights of the full network.
    """
    weights = Path(config.model.weights or "")
    folder = weights.parent.with_name(f"{weights.parent.name}_{arguments['hidden_size']}")
    if not (folder / weights.name).exists():
        changes = (f"model.args={json.dumps(arguments)}", *PRETRAINING)
        command = [sys.executable, "-m", "ist", "train", str(ROOT / "configs" / "finetune_llama.yaml")]
        command += ["--pool", "inline", "--workers", "1", "--run-dir", str(folder)]
        command += [part for change in changes for part in ("--set", change)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder / weights.name


PRETRAINING = (
    "train.epochs=1", "train.batch_size=32", "data.args={source: stdlib, max_bytes: 2000000}",
    "train.optimizer.args.lr=0.003", "recipe.stages=[]", "recipe.average.kind=none",
)  # fmt: skip
"""How the network is trained that fine-tuning starts from; see `configs/finetune_llama.yaml`."""


class Study:
    """The finished runs, and the processes that make further ones.

    Args:
        name: The name of the study.
    """

    def __init__(self, name: str) -> None:
        self._path = RESULTS / f"{name}_runs.jsonl"
        self._session = Session(name)
        self._data: dict[str, Splits] = {}

    def results(self, runs: Iterable[Run]) -> list[Any]:
        """Make the missing runs, and return the results; None for a run that diverged."""
        runs = list(runs)
        self._session.run(run for run in runs if run.label == "ddp")  # in one set of processes
        for run in runs:
            if run.label != "ddp" and run.key not in finished_runs(self._path):
                self._make(run)
        found = finished_runs(self._path)
        return [found[run.key] for run in runs]

    def is_finished(self, run: Run) -> bool:
        """Return whether a run is in the file of finished runs."""
        return run.key in finished_runs(self._path)

    def data(self, config: Config) -> Splits:
        """Return the data of a configuration; those of the last two are kept, for tuning and for testing."""
        key = config.data.model_dump_json()
        if key not in self._data:
            self._data = {**dict(list(self._data.items())[-1:]), key: load_data(config)}
        return self._data[key]

    def _make(self, run: Run) -> None:
        config = run.load()
        try:
            result = made(build_job(config, self.data(config)))
        except DivergedError as error:
            print(f"{run.key}: {error}", file=sys.stderr, flush=True)
            result = None
        add_run(self._path, run.key, result)
        if result is not None:
            print(f"{run.key}: {result['metrics']}, loss {result['test_loss']}", file=sys.stderr, flush=True)


def tuning(workload: str, point: Point, given: Sequence[str]) -> list[Run]:
    """Return a point's runs with each learning rate, of which there is one if none is tuned."""
    settings = DIALS[workload]
    factors = settings.factors if len(settings.factors) > 1 else ()
    return [run_of(settings.tuned_as or workload, point, given, factor, 0, settings.tunes) for factor in factors]


def is_measured(study: Study, workload: str, point: Point, given: Sequence[str]) -> bool:
    """Return whether a point has a finished run on the test data."""
    factors = DIALS[workload].factors
    return any(study.is_finished(run_of(workload, point, given, factor, 0, tune=False)) for factor in factors)


def measured(study: Study, workload: str, point: Point, given: Sequence[str], seeds: int) -> dict[str, Any] | None:
    """Return the results of a point; None if it diverged at every learning rate."""
    settings = DIALS[workload]
    factors, best = settings.factors, settings.factors[-1]
    if len(factors) > 1:
        runs = tuning(workload, point, given)
        reached = {f: value(r, settings.metric) for f, r in zip(factors, study.results(runs), strict=True) if r}
        if not reached:
            return None
        better = min if settings.metric in LOWER else max
        best = better(reached, key=lambda factor: reached[factor])
    finals = [run_of(workload, point, given, best, seed, tune=False) for seed in range(MOST_SEEDS)]
    found = study.results(run for seed, run in enumerate(finals) if seed < seeds or study.is_finished(run))
    results = [result for result in found if result]
    if not results:
        return None
    values = [value(result, settings.metric) for result in results]
    config = run_of(workload, point, given, best, 0, tune=False).load()
    seconds = statistics.median(result["virtual_s"] for result in results)
    return described(study, config, point, values, best, results[0]["sent_bytes"], seconds)


def described(
    study: Study, config: Config, point: Point, values: Sequence[float], factor: float, sent_bytes: int, seconds: float
) -> dict[str, Any]:
    """Return the results of a point, with its costs."""
    job = build_job(config, study.data(config))
    parameters = num_parameters(config)
    most = held(job)
    return {
        "values": values,
        "mean": statistics.mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        "lr_factor": factor,
        "lr": float(config.train.optimizer.args["lr"]),
        "virtual_s": seconds,
        "sent_bytes": sent_bytes,
        "held": asdict(most),
        "parameters": parameters,
        "state_bytes": state_bytes(config, most.fraction * parameters),
        "flops": run_flops(job),
        "keep": point.keep,
        "share": point.share,
    }


def of_workloads(study: Study, workload: str, given: Sequence[str]) -> dict[str, Any]:
    """Return the points that are contenders in `results/workloads.json`, if it is there."""
    path, settings = RESULTS / "workloads.json", DIALS[workload]
    known = json.loads(path.read_text())["workloads"] if path.exists() else {}
    rows = known.get(settings.config, {"rows": {}})["rows"]
    narrow = Point(NARROW, overrides=(stages(),), keep=0.0)
    found = {}
    for label, point in (("ddp", Point(TUNED, "ddp")), (settings.narrow, narrow)):
        if label is not None and label in rows:
            config = Run("", settings.config, label, tuple(given)).load()
            row = rows[label]
            found[point.label] = described(
                study, config, point, row["values"], 1.0, row["sent_bytes"], row["virtual_s"]
            )
    return found


HEADS = (
    "workload", "setting", "metric", "mean, spread (seeds)", "against data-parallel", "sent",
    "state of a worker", "most of the network that a worker ever held", "arithmetic of a worker",
)  # fmt: skip


def rows(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """Yield all points of all workloads under `HEADS`."""
    order = [point.label for point in (*dial(), *TRIALS)]
    for workload, entry in found.items():
        metric, points = entry["metric"], entry["points"]
        base = points.get(TUNED, points.get(FULL))
        ranks = {label: order.index(label) if label in order else len(dial()) - 0.5 for label in entry["points"]}
        for label in sorted(ranks, key=lambda label: ranks[label]):  # the dial, the controls, the trials
            row = entry["points"][label]
            steps = "" if row["held"]["steps"] == 1 else f", in {row['held']['steps']:.0%} of its steps"
            # Small and wide networks have another number of parameters than the workload's network.
            spread = f" ± {format_metric(metric, row['spread'])}" if len(row["values"]) > 1 else ""
            fraction = row["held"]["fraction"] * row["parameters"] / entry["parameters"]
            yield (
                workload,
                label,
                "loss" if metric == "test_loss" else metric_title(metric),
                f"{format_metric(metric, row['mean'])}{spread} ({len(row['values'])})",
                behind(metric, row["mean"], base["mean"]) if base and row is not base else "",
                format_bytes(row["sent_bytes"]),
                format_bytes(row["state_bytes"]),
                f"{fraction:.0%}{steps}",
                f"{row['flops'] / 1e9:.3g} GFLOP",
            )


def markdown(found: Mapping[str, Any]) -> str:
    """Return the table of `benchmarks/README.md`."""
    lines = (HEADS, ["---"] * len(HEADS), *((f"`{workload}`", *others) for workload, *others in rows(found)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


OVERVIEW = (
    "workload, metric", "data-parallel, as configured", "own shares (1/4)", "small network in their memory",
    "the same, data-parallel", "halves", "small network in their memory", "best with at most halves", "goal",
)  # fmt: skip
POINTS = 0.005
PER_CENT = 0.015


def overview(found: Mapping[str, Any]) -> str:
    """Return the table of the controls and of the points in which no worker holds more than half of each group.

    The goal: to be at most half a point, or 1.5 % of a loss, behind data-parallel training as configured.
    """
    lines = [OVERVIEW, ["---"] * len(OVERVIEW)]
    for workload in WORKLOADS:
        entry = found.get(f"{workload}_full_length", found.get(workload))
        if entry is None or TUNED not in entry["points"]:
            continue
        metric, points = entry["metric"], entry["points"]
        base = points[TUNED]["mean"]
        narrow = [label for label, row in points.items() if row["keep"] == 0 or is_half(label, row)]
        better = min if metric in LOWER else max
        best = better(narrow, key=lambda label: points[label]["mean"]) if narrow else None
        cells = [f"`{workload}`, {'loss' if metric == 'test_loss' else metric_title(metric)}"]
        small = "small network in the memory of"
        for label in (TUNED, NARROW, f"{small} 1/4, local SGD", f"{small} 1/4, data-parallel", "keep 0.5 for 1",
                      f"{small} 0.5, local SGD"):  # fmt: skip
            row = points.get(label)
            cells.append(f"{format_metric(metric, row['mean'])} ({len(row['values'])})" if row else "")
        if best is None:
            lines.append([*cells, "", ""])
            continue
        mean = points[best]["mean"]
        is_met = mean <= base * (1 + PER_CENT) if metric in LOWER else mean >= base - POINTS
        cells.append(f"{best.removeprefix('trial: ')}: {behind(metric, mean, base)} ({len(points[best]['values'])})")
        lines.append([*cells, "met" if is_met else "missed"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def is_half(label: str, row: Mapping[str, Any]) -> bool:
    """Return whether a point is a trial, or one of the dial in which workers hold at most half of each group."""
    return row["keep"] == 0.5 or label.startswith("trial: ")


PANELS = (("mean", ""), ("sent_bytes", "bytes sent"), ("state_bytes", "state of a worker, bytes"),
          ("flops", "arithmetic of a worker, FLOP"))  # fmt: skip


def plot(entry: Mapping[str, Any]) -> str:
    """Return the plot of a workload as an `<svg>` element: a panel for the metric and for each cost."""
    points, figure = entry["points"], Figure(figsize=(11, 8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        narrow = [row for row in points.values() if row["keep"] == 0]
        for number, keep in enumerate(KEEPS):
            curve = narrow + sorted(
                (row for row in points.values() if row["keep"] == keep), key=lambda row: float(row["share"])
            )
            places = [row["share"] for row in curve], [row[key] for row in curve]
            axes.plot(*places, marker=".", color=f"C{number}", label=f"keep {keep:g}")
        others = [(label, row) for label, row in points.items() if "small network" in label or label in (FULL, TUNED)]
        for number, (label, row) in enumerate(others):
            style = "solid" if label == TUNED else "dotted" if "data-parallel" in label else "dashed"
            color = "black" if label in (FULL, TUNED) else f"C{len(KEEPS) + number // 2}"
            axes.axhline(row[key], linestyle=style, color=color, linewidth=1, label=label)
        axes.set_xlabel("share of the steps with this keep fraction")
        metric = entry["metric"]
        axes.set_ylabel(title or ("test loss" if metric == "test_loss" else f"test {metric_title(metric)}"))
        if key == "sent_bytes":
            axes.set_yscale("log")
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "mean":
            axes.legend(fontsize="x-small")
    return svg(figure)


def shown(found: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    table = Table(*HEADS)
    for row in rows(found):
        table.add_row(*row)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="crime_mlp,speech_mlp,kjv_decoder", help="names of configurations")
    parser.add_argument("--parts", default="dial,controls,trials", help="which points: dial, controls, trials")
    parser.add_argument("--points", help="only points whose labels contain one of these, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--crime", default=".data/crime", help="Communities and Crime")
    parser.add_argument("--fsdd", default="fsdd.npz", help="the Free Spoken Digits")
    parser.add_argument("--cora", default="cora.npz", help="Cora")
    parser.add_argument("--llama", default="runs/base/model.safetensors", help="the weights to fine-tune")
    parser.add_argument("--finished", action="store_true", help="make no runs, only summarize the finished ones")
    parser.add_argument("--quick", action="store_true", help="digits, four rounds: only check that it runs")
    parser.add_argument("--markdown", action="store_true", help="only print the tables of the finished runs")
    asked = parser.parse_args(arguments)
    name = "dial_quick" if asked.quick else "dial"
    path = RESULTS / f"{name}.json"
    summaries = json.loads(path.read_text())["workloads"] if path.exists() else {}
    if asked.markdown:
        print(overview(summaries), markdown(summaries), sep="\n\n")
        return
    torch.set_num_threads(1)
    study = Study(name)
    for workload in ["quickstart"] if asked.quick else asked.only.split(","):
        files = {key: Path(getattr(asked, option)).absolute() for key, option in DIALS[workload].files.items()}
        given = [f"{key}={file}" for key, file in files.items()]
        if asked.quick:
            given += ["train.epochs=null", "train.rounds=4", "train.local_steps=2"]
        splits = study.data(configuration(workload, dial()[0], given))
        chosen = asked.parts.split(",")
        points = points_of(workload) if "dial" in chosen else []
        points += controls(workload, given, splits) if "controls" in chosen else []
        points += trials(workload) if "trials" in chosen else []
        if asked.points:
            points = [point for point in points if any(text in point.label for text in asked.points.split(";"))]
        if asked.finished:
            points = [point for point in points if is_measured(study, workload, point, given)]
        entry = summaries.setdefault(workload, {"metric": DIALS[workload].metric, "points": {}})
        entry["overrides"] = list(DIALS[workload].overrides)
        entry["parameters"] = num_parameters(configuration(workload, dial()[0], given))
        entry["points"] |= of_workloads(study, workload, given)
        points = [point for point in points if point.label != NARROW or DIALS[workload].narrow is None]
        study.results(run for point in points if point.method == "ddp" for run in tuning(workload, point, given))
        for point in points:
            row = measured(study, workload, point, given, 1 if asked.quick else asked.seeds)
            if row is not None:
                entry["points"][point.label] = row
            summaries = {known: summaries[known] for known in DIALS if known in summaries}
            write_result(name, {"workloads": summaries})
        (RESULTS / f"{name}_{workload}.svg").write_text(plot(entry))
    Console(width=200).print(shown(summaries))
    print(path)


if __name__ == "__main__":
    main()

"""The benefit of each part of a recipe: plain IST, and IST with one change.

    python -m benchmarks.recipes [--only crime_mlp,speech_mlp] [--seeds 3] [--fsdd FILE] [--quick]

Claim: none; `docs/recipes.md` has the results. Each variant trains for the same number of epochs as plain IST, with the
same grid of learning rates for the first seed, and with the best rate for all seeds; it is evaluated on held-out
training data. Finished runs are lines of `results/recipes_runs.jsonl`; see `benchmarks/session.py`.
"""

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, write_result
from benchmarks.held import Held, held
from benchmarks.session import Run, Session
from benchmarks.workloads import LOWER, WORKLOADS, value
from ist.config.load import load_config
from ist.monitoring.display import format_bytes, format_metric, metric_title
from ist.runs.build import build_job

PLAIN = (
    "recipe.stages=[]",
    "recipe.average.kind=none",
    "exchange.up=exact",
    "exchange.down=exact",
    "exchange.values=weights",
    "train.activation_scale=folded",
    "train.optimizer_state=reset",
    "data.shuffle=local",
)
"""IST as published, with activation scales folded into the weights."""

# {t} is the number of local steps of the configuration, {r} a sixth of its rounds.
FINISH = "recipe.stages=[{{}}, {{rounds: {r}, keep: 1}}]"
OUTER_FINISH = FINISH.replace("keep: 1", "keep: 1, outer: {{lr: 0.7, momentum: 0.9}}")
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "scale: none": ("train.activation_scale=none",),
    "scale: width": ("train.activation_scale=width",),
    "finish: whole networks": (FINISH,),
    "finish, optimiser state kept": (FINISH, "train.optimizer_state=kept"),
    "finish, state kept, outer step of 0.7 and 0.9": (OUTER_FINISH, "train.optimizer_state=kept"),
    "warm-up: whole networks": ("recipe.stages=[{{rounds: {r}, keep: 1}}, {{}}]",),
    "growth: keep 1/2, then 3/4": ("recipe.stages=[{{}}, {{rounds: {r}, keep: 0.5}}, {{rounds: {r}, keep: 0.75}}]",),
    "overlap: keep 1/2": ("partition.keep=0.5",),
    "longer rounds late": ("recipe.stages=[{{}}, {{rounds: {r}, local_steps: {tt}}}]",),
    "schedule over rounds": ("train.schedule_unit=round",),
    "optimiser state carried": ("train.optimizer_state=carried",),
    "global shuffle": ("data.shuffle=global",),
    "outer Nesterov 0.5": ("recipe.outer.momentum=0.5",),
    "outer Nesterov 0.9, rate 0.3": ("recipe.outer.momentum=0.9", "recipe.outer.lr=0.3"),
    "EMA 0.8": ("recipe.average.kind=ema",),
    "SWA of the last quarter": ("recipe.average.kind=swa", "recipe.average.start=0.75"),
    "balanced dealing": ("partition.coverage=balanced",),
    "statistics of one batch": ("evaluate.statistics_batches=1",),
    "int8 deltas": ("exchange.up=int8", "exchange.down=int8", "exchange.values=deltas"),
}
FACTORS = (1 / 3, 1.0)
"""The learning rates relative to that of the configuration, which was tuned for its full recipe."""


def runs_of(workload: str, variant: str, given: tuple[str, ...], seed: int) -> dict[float, Run]:
    """Return a variant's runs by factor of the learning rate."""
    config = load_config(ROOT / "configs" / f"{workload}.yaml")
    tau, base = config.train.local_steps, float(config.train.optimizer.args["lr"])
    rounds = max(1, round(plain_rounds(workload, given) / 6))
    changes = tuple(
        change.format(t=tau, tt=2 * tau, r=rounds) if "stages" in change else change for change in VARIANTS[variant]
    )
    return {
        factor: Run(
            f"{workload}: {variant}, lr {base * factor:.3g}, seed {seed}", workload, "ist",
            (*PLAIN, *given, *changes, f"train.optimizer.args.lr={base * factor:.3g}", f"seed={seed}"),
        )
        for factor in FACTORS
    }  # fmt: skip


def plain_rounds(workload: str, given: tuple[str, ...]) -> int:
    """Return the number of rounds of plain IST."""
    if workload not in _ROUNDS:
        _ROUNDS[workload] = build_job(Run("", workload, "ist", (*PLAIN, *given)).load()).schedule.num_rounds
    return _ROUNDS[workload]


_ROUNDS: dict[str, int] = {}


def study(session: Session, workload: str, given: tuple[str, ...], seeds: int) -> dict[str, Any]:
    """Return the results of each variant."""
    metric = WORKLOADS[workload].metric
    first = {variant: runs_of(workload, variant, given, 0) for variant in VARIANTS}
    found = session.run(run for runs in first.values() for run in runs.values())
    better = min if metric in LOWER else max
    rows: dict[str, Any] = {}
    for variant, runs in first.items():
        reached = {factor: value(found[run.key], metric) for factor, run in runs.items() if found[run.key]}
        if not reached:
            continue
        best = better(reached, key=lambda factor: reached[factor])
        all_seeds = [runs_of(workload, variant, given, seed)[best] for seed in range(seeds)]
        found |= session.run(all_seeds)
        results = [found[run.key] for run in all_seeds if found[run.key]]
        values = [value(result, metric) for result in results]
        rows[variant] = {
            "values": values,
            "mean": statistics.mean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
            "lr_factor": best,
            "sent_bytes": results[0]["sent_bytes"],
            "virtual_s": statistics.median(result["virtual_s"] for result in results),
            "held": asdict(held(build_job(all_seeds[0].load()))),
        }
    return {"metric": metric, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="crime_mlp,speech_mlp,kjv_decoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--crime", default=".data/crime", help="Communities and Crime")
    parser.add_argument("--fsdd", default="fsdd.npz", help="the Free Spoken Digits")
    parser.add_argument(
        "--quick", action="store_true", help="the first workload, short, one seed: only check that it runs"
    )
    asked = parser.parse_args()
    name = "recipes_quick" if asked.quick else "recipes"
    session = Session(name)
    studies: dict[str, Any] = {}
    for workload in asked.only.split(",")[: 1 if asked.quick else None]:
        files = {key: Path(getattr(asked, option)).absolute() for key, option in WORKLOADS[workload].files.items()}
        given = ("data.args.validation=true", *(f"{key}={file}" for key, file in files.items()))
        given += ("train.epochs=12",) if asked.quick else ()
        studies[workload] = study(session, workload, given, 1 if asked.quick else asked.seeds)
        print(write_result(name, {"studies": studies}))
    for workload, found in studies.items():
        metric = found["metric"]
        shown = Table(
            "variant", metric_title(metric), "against plain", "sent", "own cores, s", "lr of the grid",
            "most of the network that a worker ever held", title=workload,
        )  # fmt: skip
        plain = found["rows"]["plain"]["mean"]
        for variant, row in found["rows"].items():
            change = (
                f"{(row['mean'] / plain - 1) * 100:+.1f} %"
                if metric in LOWER
                else f"{(row['mean'] - plain) * 100:+.2f}"
            )
            shown.add_row(
                variant, f"{format_metric(metric, row['mean'])} ± {format_metric(metric, row['spread'])}", change,
                format_bytes(row["sent_bytes"]), f"{row['virtual_s']:.1f}", f"{row['lr_factor']:.2g}x",
                str(Held(**row["held"])),
            )  # fmt: skip
        Console(width=120).print(shown)


if __name__ == "__main__":
    main()

"""[MRN] figure 2a: the error at every step, which falls, drops at a merge, and rises when subnetworks are drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from ist.theory.algorithm import Run, train
from ist.theory.experiment import DataSettings, Point, Probability, Row, Section, Table
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import Scaling
from ist.theory.quantities.published import FIGURE_2A

QUICK: Mapping[str, Any] = {"samples": 40, "m": 400, "seeds": 2}


class Settings(DataSettings):
    """Settings of figure 2a."""

    scaling: Scaling = Field("standardised", description="'standardised' columns, or 'raw' ones")
    m: int = Field(4000, ge=1, description="hidden neurons")
    p: int = Field(10, ge=1, description="subnetworks")
    tau: int = Field(10, ge=1, description="local steps")
    K: int = Field(12, ge=2, description="rounds")
    xi: tuple[Probability, ...] = Field(
        (0.3, 0.5, 0.8), min_length=1, description="probability that a subnetwork holds a neuron"
    )
    eta: float = Field(0.015, gt=0, description="step size")
    kappa: float = Field(0.8, gt=0, description="standard deviation of the initial weights")
    seeds: int = Field(5, ge=1)


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each xi and seed."""
    for xi in settings.xi:
        Law(settings.m, settings.p, xi)
    return [{"xi": xi, "seed": seed} for xi in settings.xi for seed in range(settings.seeds)]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the error before each local step, after the last, and after the merge."""
    law = Law(settings.m, settings.p, point["xi"])
    run = Run(law, settings.tau, settings.K, settings.eta, settings.kappa, point["seed"])
    trace = train(settings.problem(), [run], local_errors=True)
    assert trace.local_errors is not None
    rows: list[Row] = []
    for number, (local, merged) in enumerate(zip(trace.local_errors[0], trace.errors[0, 1:], strict=True)):
        of_round = [("local", float(error)) for error in local] + [("merged", float(merged))]
        for kind, error in of_round:
            rows.append({**point, "round": number, "value": len(rows), "kind": kind, "error": error})
    return rows


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Plot the sawtooth, and compare its heights with the published ones."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots()
    heights = {}
    drops, rises = [], []
    for xi in settings.xi:
        own = [row for row in rows if row["xi"] == xi]
        curves = np.array([[r["error"] for r in own if r["seed"] == seed] for seed in range(settings.seeds)])
        logs = np.log(curves)
        middle, spread = logs.mean(axis=0), logs.std(axis=0)
        (line,) = axes.plot(np.exp(middle), label=f"ξ = {xi:g}", linewidth=1.3)
        steps = np.arange(len(middle))
        axes.fill_between(
            steps, np.exp(middle - spread), np.exp(middle + spread), color=line.get_color(), alpha=0.2, linewidth=0
        )
        period = settings.tau + 2
        by_round = curves.mean(axis=0).reshape(settings.K, period)
        heights[xi] = by_round
        drops.append(float(np.mean(by_round[:, -1] < by_round[:, -2])))
        rises.append(float(np.mean(by_round[1:, 0] > by_round[:-1, -1])))
    axes.set_yscale("log")
    axes.set_xlabel("value: error of subnetworks before each local step and after the last, then of the merged network")
    axes.set_ylabel("mean squared training error")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    first, last = slice(1, 4), slice(-3, None)
    table = Table(
        ("", "published", *(f"ours, ξ = {xi:g}" for xi in settings.xi)),
        [
            ("first value", FIGURE_2A["first value"], *(f"{h[0, 0]:.3f}" for h in heights.values())),
            ("falls to", FIGURE_2A["falls to"], *(f"{h[last, -1].min():.3f}" for h in heights.values())),
            ("first peaks", FIGURE_2A["first peaks"], *(f"{h[first, 0].mean():.3f}" for h in heights.values())),
            ("last peaks", FIGURE_2A["last peaks"], *(f"{h[last, 0].mean():.3f}" for h in heights.values())),
        ],
    )
    return Section(
        title="Figure 2a: fall, drop, rise",
        claim="In a round the subnetworks' errors fall smoothly; merging them drops the error at once, and drawing "
        "new subnetworks raises it. The published curves have a period of 11 values: ten local steps, one merge.",
        method=f"Data: {settings.describe()}; Bernoulli masks, m = {settings.m}, p = {settings.p}, τ = "
        f"{settings.tau}, η = {settings.eta:g}, κ = {settings.kappa:g}, {settings.seeds} seeds (line: geometric mean, "
        "band: one deviation). Local values are means over the errors of the subnetworks, merged values are errors of "
        "the full network, scaled by ξ. The period here is τ + 2, because the plot has the error before the first step "
        "as well as after the last. p, η, κ and the preprocessing are not published for this figure: the defaults were "
        "chosen to give similar heights.",
        found=[
            f"Merging lowered the error in {min(drops):.0%} to {max(drops):.0%} of the rounds, and drawing new "
            f"subnetworks raised it in {min(rises):.0%} to {max(rises):.0%} (by ξ).",
        ],
        figures={"figure2a": (figure, "Error at every step.")},
        tables={"Heights of the sawtooth": table},
    )

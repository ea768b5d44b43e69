"""Five settings of one algorithm: gradient descent, dropout, multi-sample dropout, and IST with both kinds of masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from ist.theory.algorithm import Run, train
from ist.theory.experiment import DataSettings, Point, Probability, Row, Section, Table
from ist.theory.quantities.masks import Law

QUICK: Mapping[str, Any] = {"samples": 30, "m": 300, "trainings": 40, "seeds": 2}


class Settings(DataSettings):
    """Settings of the comparison."""

    m: int = Field(4000, ge=1, description="hidden neurons")
    p: int = Field(8, ge=2, description="subnetworks, for methods with several")
    tau: int = Field(5, ge=2, description="local steps, for methods with several")
    xi: Probability = Field(0.5, description="probability that a subnetwork holds a neuron")
    trainings: int = Field(400, ge=10, description="expected steps of each neuron, θ·τ·K: the same for all methods")
    eta: float = Field(0.02, gt=0, description="step size")
    seeds: int = Field(4, ge=2)


def methods(settings: Settings) -> dict[str, tuple[Law, int]]:
    """Return the distribution of the masks and tau of each method."""
    m, p, xi = settings.m, settings.p, settings.xi
    return {
        "gradient descent": (Law(m, 1, 1.0), 1),
        "dropout": (Law(m, 1, xi), 1),
        "multi-sample dropout": (Law(m, p, xi), 1),
        "IST, Bernoulli": (Law(m, p, xi), settings.tau),
        "IST, categorical": (Law(m, p, None), settings.tau),
    }


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each method and seed."""
    return [{"method": name, "seed": seed} for name in methods(settings) for seed in range(settings.seeds)]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the error before each round and at the end, by the expected number of steps of a neuron."""
    law, tau = methods(settings)[point["method"]]
    rounds = max(2, round(settings.trainings / (law.theta * tau)))
    run = Run(law, tau, rounds, settings.eta, seed=point["seed"])
    errors = train(settings.problem(), [run]).errors[0].tolist()
    return [{**point, "trainings": number * tau * law.theta, "error": error} for number, error in enumerate(errors)]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Plot the curves of all methods."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    lines, last, noise = [], {}, {}
    for name, (law, tau) in methods(settings).items():
        own = [row for row in rows if row["method"] == name]
        places = sorted({row["trainings"] for row in own})
        curves = np.array([[r["error"] for r in own if r["seed"] == seed] for seed in range(settings.seeds)])
        axes.plot(places, np.exp(np.log(curves).mean(axis=0)), label=name, linewidth=1.2)
        quarter = max(2, len(places) // 4)
        last[name] = float(curves[:, -quarter:].mean())
        noise[name] = float(np.diff(np.log(curves[:, -quarter:]), axis=1).std())
        xi = "1/p" if law.xi is None else f"{law.xi:g}"
        lines.append(
            (name, str(law.subnetworks), str(tau), xi, f"{law.theta:.3f}", f"{last[name]:.4f}", f"{noise[name]:.3f}")
        )
    axes.set_yscale("log")
    axes.set_xlabel("expected gradient steps of a neuron, θ·τ·K")
    axes.set_ylabel("mean squared training error")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    one, several = "dropout", "multi-sample dropout"
    return Section(
        title="Dropout and its relatives are settings of one scheme",
        claim="Dropout is p = 1, τ = 1; multi-sample dropout p ≥ 1, τ = 1; IST p ≥ 1, τ ≥ 1 with Bernoulli or "
        "categorical masks; p = 1, ξ = 1 is gradient descent (section 3). The error of multi-sample dropout has (θ − "
        "ξ²)/p where dropout's has θ − ξ² (Corollaries 4 and 5).",
        method=f"The same code with five settings. Data: {settings.describe()}; m = {settings.m}, η = "
        f"{settings.eta:g}, {settings.seeds} seeds. The number of rounds of each method is such that a neuron is "
        f"trained {settings.trainings} times in expectation, so that θ alone gives no advantage. Noise: the standard "
        "deviation of the change of the log error from one round to the next, over the last quarter.",
        found=[
            f"With p = {settings.p} masks per step the noise of dropout falls from {noise[one]:.3f} to "
            f"{noise[several]:.3f}, and the error over the last quarter goes from {last[one]:.4f} to "
            f"{last[several]:.4f}.",
        ],
        figures={"relatives": (figure, "Error of the full network, scaled by ξ; geometric mean of the seeds.")},
        tables={"Settings, and the last quarter": Table(("", "p", "τ", "ξ", "θ", "error", "noise"), lines)},
    )

"""Dropout, multi-sample dropout, IST with either masks, and gradient descent: five settings of one algorithm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from ist.theory.algorithm import Run, train
from ist.theory.experiment import DataSettings, Point, Row, Section, Table
from ist.theory.masks import Law

QUICK: Mapping[str, Any] = {"samples": 30, "m": 300, "steps": 60, "seeds": 2}


class Settings(DataSettings):
    """Knobs of the comparison."""

    m: int = Field(4000, ge=1, description="hidden neurons")
    p: int = Field(8, ge=2, description="subnetworks, where there are several")
    tau: int = Field(5, ge=2, description="local steps, where there are several")
    xi: float = Field(0.5, description="probability that a subnetwork holds a neuron")
    steps: int = Field(200, ge=10, description="gradient steps of every method, K·τ")
    eta: float = Field(0.02, gt=0, description="step size")
    seeds: int = Field(3, ge=1)


def methods(settings: Settings) -> dict[str, tuple[Law, int]]:
    """Return the law of the masks and tau of every method."""
    m, p, xi = settings.m, settings.p, settings.xi
    return {
        "gradient descent": (Law(m, 1, 1.0), 1),
        "dropout": (Law(m, 1, xi), 1),
        "multi-sample dropout": (Law(m, p, xi), 1),
        "IST, Bernoulli": (Law(m, p, xi), settings.tau),
        "IST, categorical": (Law(m, p, None), settings.tau),
    }


def points(settings: Settings) -> Sequence[Point]:
    """A point for each method and seed."""
    return [{"method": name, "seed": seed} for name in methods(settings) for seed in range(settings.seeds)]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """The error before every round and at the end."""
    law, tau = methods(settings)[point["method"]]
    run = Run(law, tau, max(1, settings.steps // tau), settings.eta, seed=point["seed"])
    errors = train(settings.problem(), [run]).errors[0].tolist()
    return [{**point, "step": number * tau, "error": error} for number, error in enumerate(errors)]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """All curves in one picture."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = []
    for name, (law, tau) in methods(settings).items():
        own = [row for row in rows if row["method"] == name]
        steps = sorted({row["step"] for row in own})
        curves = np.array([[r["error"] for r in own if r["seed"] == seed] for seed in range(settings.seeds)])
        axes.plot(steps, np.exp(np.log(curves).mean(axis=0)), label=name, marker="." if tau > 1 else None)
        xi = "1/p" if law.xi is None else f"{law.xi:g}"
        tail = curves[:, -max(1, len(steps) // 4) :].mean(axis=1)
        lines.append(
            (name, str(law.subnetworks), str(tau), xi, f"{law.theta:.3f}", f"{tail.mean():.4f} ± {tail.std():.4f}")
        )
    axes.set_yscale("log")
    axes.set_xlabel("gradient steps, K·τ")
    axes.set_ylabel("mean squared training error")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    return Section(
        title="Dropout and its relatives are settings of one scheme",
        claim="Dropout is p = 1, τ = 1; multi-sample dropout p ≥ 1, τ = 1; IST p ≥ 1, τ ≥ 1 with Bernoulli or "
        "categorical masks; p = 1, ξ = 1 is gradient descent (section 3; Corollaries 4 to 6, Theorem 7).",
        method=f"The same code with five settings: m = {settings.m}, η = {settings.eta:g}, {settings.steps} gradient "
        f"steps, {settings.seeds} seeds, the same initial weights for all.",
        found=[
            "Averaging over p masks a step takes most of dropout's noise away, as (θ − ξ²)/p in Corollary 5 does."
            if float(lines[2][-1].split()[0]) < float(lines[1][-1].split()[0])
            else "Averaging over p masks a step did not lower the error here, against Corollary 5."
        ],
        figures={"relatives": (figure, "Error of the whole network, ξ-scaled; geometric mean of the seeds.")},
        tables={"Settings, and the error over the last quarter": Table(("", "p", "τ", "ξ", "θ", "error"), lines)},
    )

"""Theorem 3, Corollaries 4 to 6, Theorem 7: the error that is left in the end, against p, xi, tau and m."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from ist.theory import bounds
from ist.theory.algorithm import Run, train
from ist.theory.experiment import Point, Row, Section, Table
from ist.theory.experiment import Settings as Base
from ist.theory.kernels import infinite_ntk, least_eigenvalue
from ist.theory.masks import Law
from ist.theory.problem import Problem, sphere
from ist.theory.statistics import exponent

QUICK: Mapping[str, Any] = {
    "K": 150, "seeds": 4, "m": (128, 512), "p": (2, 8), "xi": (0.5, 0.8), "tau": (1, 4), "m_fixed": 256,
}  # fmt: skip


class Settings(Base):
    """Knobs of the floors' experiment, on inputs drawn from the sphere."""

    n: int = Field(10, ge=2, description="samples")
    d: int = Field(40, ge=2, description="inputs")
    m: tuple[int, ...] = Field((128, 256, 512, 1024, 2048, 4096), min_length=2, description="widths")
    p: tuple[int, ...] = Field((1, 2, 4, 8, 16), min_length=2, description="numbers of subnetworks")
    xi: tuple[float, ...] = Field((0.3, 0.5, 0.7, 0.8, 0.9, 0.95), min_length=2)
    tau: tuple[int, ...] = Field((1, 2, 4, 8, 16), min_length=2, description="numbers of local steps")
    m_fixed: int = Field(1024, ge=1, description="width where another number varies")
    p_fixed: int = Field(4, ge=2)
    xi_fixed: float = 0.5
    tau_fixed: int = Field(2, ge=1)
    eta: float = Field(0.1, gt=0, description="step size")
    K: int = Field(1500, ge=20, description="rounds; the floor is the mean over the last third")
    seeds: int = Field(8, ge=2)


SWEEPS = {
    "Bernoulli, m": "(1 − ξ)²/m in B₁'s first term; its others do not fall with m",
    "Bernoulli, p": "(θ − ξ²)/p",
    "Bernoulli, 1 − ξ": "(1 − ξ)² and θ − ξ²: exponent 1 to 2",
    "Bernoulli, τ": "grows as (τ − 1)²/τ², η(τ − 1): at most 1 + η²τ²",
    "categorical, m": "1/m: exponent −1",
    "categorical, p − 1": "(p − 1)²/λ₀², λ₀ ∝ 1/p: at most exponent 4",
    "categorical, τ": "τ: exponent at most 1",
}
"""What varies, and how [MRN]'s floor depends on it."""


def points(settings: Settings) -> Sequence[Point]:
    """A point for each value that varies."""
    s = settings
    fixed = {"m": s.m_fixed, "p": s.p_fixed, "xi": s.xi_fixed, "tau": s.tau_fixed}
    categorical = {**fixed, "xi": 0.0}
    found: list[Point] = [
        *({"sweep": "Bernoulli, m", **fixed, "m": m} for m in s.m),
        *({"sweep": "Bernoulli, p", **fixed, "p": p} for p in s.p),
        *({"sweep": "Bernoulli, 1 − ξ", **fixed, "xi": xi} for xi in s.xi),
        *({"sweep": "Bernoulli, τ", **fixed, "tau": tau} for tau in s.tau),
        *({"sweep": "categorical, m", **categorical, "m": m} for m in s.m),
        *({"sweep": "categorical, p − 1", **categorical, "p": p} for p in s.p),
        *({"sweep": "categorical, τ", **categorical, "tau": tau} for tau in s.tau),
    ]
    for point in found:
        Law(point["m"], point["p"], point["xi"] or None)
    return found


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """The floor of each seed."""
    problem = sphere(settings.n, settings.d)
    law = Law(point["m"], point["p"], point["xi"] or None)
    runs = [Run(law, point["tau"], settings.K, settings.eta, seed=seed) for seed in range(settings.seeds)]
    errors = train(problem, runs).errors
    third = settings.K // 3
    last, before = errors[:, -third:].mean(dim=1), errors[:, -2 * third : -third].mean(dim=1)
    return [
        {**point, "seed": seed, "floor": float(a), "before": float(b)}
        for seed, (a, b) in enumerate(zip(last, before, strict=True))
    ]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """A panel for each sweep, with fitted exponents and the bound."""
    problem = sphere(settings.n, settings.d)
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    panels = figure.subplots(2, 4).ravel()
    lines, found = [], []
    for axes, (sweep, theory) in zip(panels, SWEEPS.items(), strict=False):
        own = [point for point in points(settings) if point["sweep"] == sweep]
        xs, floors, proved, settled = [], [], [], True
        for point in own:
            of_point = [row for row in rows if all(row[key] == point[key] for key in point)]
            x = _x(sweep, point)
            values = [row["floor"] for row in of_point]
            if x == 0:  # p = 1: gradient descent
                found.append(f"p = 1 (categorical): the floor is {np.mean(values):.1g}: it vanishes, as in Theorem 7.")
                continue
            settled = settled and np.mean(values) > 0.7 * np.mean([row["before"] for row in of_point])
            xs.append(x)
            floors.append(values)
            setting = _setting(settings, problem, point)
            bound = bounds.bernoulli_floor(setting) if point["xi"] else bounds.categorical_floor(setting)
            proved.append(bound / settings.n)
        means = [float(np.mean(values)) for values in floors]
        axes.errorbar(
            xs, means, yerr=[2 * np.std(v) / len(v) ** 0.5 for v in floors], marker="o", capsize=2, label="measured"
        )
        axes.plot(xs, proved, "k--", label="bound" if "Bern" in sweep else "bound, up to its constant")
        fit = exponent(xs, floors)
        axes.set_title(f"{sweep}: exponent {fit}", fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(sweep.split(", ")[1])
        axes.set_ylabel("error that is left (mean over samples)")
        axes.grid(visible=True, alpha=0.3, which="both")
        axes.legend(fontsize=7)
        if not settled:
            axes.text(0.5, 0.5, "some runs still fall:\nnot all are floors", transform=axes.transAxes, ha="center")
        loose = [bound / value for bound, value in zip(proved, means, strict=True)]
        lines.append((sweep, theory, str(fit), f"{min(loose):.2g} to {max(loose):.2g}", "yes" if settled else "no"))
    panels[-1].axis("off")
    panels[-1].text(
        0, 0.5, "The bounds ask for m far above n³d/λ₀²:\nhere they are loose by the factors\nin the table, and no "
        "practical width\nmeets them.", fontsize=10, va="center",
    )  # fmt: skip
    return Section(
        title="Error floors: what random masks leave behind",
        claim="B₁ of Theorem 3 is the error that Bernoulli masks leave; categorical masks leave O(τ(p − "
        "1)²n³d/(λ₀²m)), which vanishes for p = 1 and as m grows (Theorem 7).",
        method=f"n = {settings.n} inputs on the sphere, d = {settings.d}, η = {settings.eta:g}, K = {settings.K}, "
        f"{settings.seeds} seeds; floor: mean over the last third. What does not vary: m = {settings.m_fixed}, p = "
        f"{settings.p_fixed}, ξ = {settings.xi_fixed:g}, τ = {settings.tau_fixed}. Exponents are fitted to the means, "
        "with 95 % bootstrap intervals over the seeds.",
        found=[*found, "Exponents below the bound's are no contradiction: it is an upper bound, and loose."],
        figures={"floors": (figure, "Floors with two standard errors, and bounds.")},
        tables={
            "Exponents": Table(("varied", "in the bound", "fitted exponent", "bound / measured", "settled"), lines)
        },
    )


def _x(sweep: str, point: Point) -> float:
    varied = sweep.split(", ")[1]
    found = {"m": point["m"], "p": point["p"], "1 − ξ": 1 - point["xi"], "τ": point["tau"], "p − 1": point["p"] - 1}
    return float(found[varied])


def _setting(settings: Settings, problem: Problem, point: Point) -> bounds.Setting:
    law = Law(point["m"], point["p"], point["xi"] or None)
    return bounds.Setting(
        settings.n, settings.d, point["m"], point["p"], point["tau"], law.probability, law.theta, settings.eta,
        least_eigenvalue(infinite_ntk(problem.inputs, law.probability)),
    )  # fmt: skip

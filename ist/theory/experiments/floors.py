"""Theorem 3, Corollaries 4 to 6, Theorem 7: the error floor by p, xi, tau and m."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field

from ist.errors import ConfigError
from ist.theory.algorithm import Run, train
from ist.theory.experiment import Count, Point, Probability, Row, Section, Table, bound_setting, rows_at
from ist.theory.experiment import Settings as Base
from ist.theory.quantities import bounds
from ist.theory.quantities.kernels import infinite_ntk, least_eigenvalue
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import Problem, sphere
from ist.theory.quantities.statistics import exponent, standard_error

QUICK: Mapping[str, Any] = {
    "K": 150, "seeds": 4, "m": (128, 512), "p": (2, 8), "xi": (0.5, 0.8), "tau": (1, 4), "m_fixed": 256,
}  # fmt: skip


class Settings(Base):
    """Settings of the experiment on error floors, with inputs drawn from the sphere."""

    n: int = Field(10, ge=2, description="samples")
    d: int = Field(40, ge=2, description="inputs")
    m: tuple[Count, ...] = Field((128, 256, 512, 1024, 2048, 4096), min_length=2, description="widths")
    p: tuple[Count, ...] = Field((1, 2, 4, 8, 16), min_length=2, description="numbers of subnetworks")
    xi: tuple[Probability, ...] = Field((0.3, 0.5, 0.7, 0.8, 0.9, 0.95), min_length=2)
    tau: tuple[Count, ...] = Field((1, 2, 4, 8, 16), min_length=2, description="numbers of local steps")
    m_fixed: int = Field(1024, ge=1, description="width in the sweeps over other quantities")
    p_fixed: int = Field(4, ge=2)
    xi_fixed: Probability = 0.5
    tau_fixed: int = Field(2, ge=1)
    eta: float = Field(0.1, gt=0, description="step size")
    K: int = Field(1500, ge=20, description="rounds; the floor is the mean over the last third")
    seeds: int = Field(8, ge=2)


SWEEPS = (
    "Bernoulli, m", "Bernoulli, p", "Bernoulli, 1 − ξ", "Bernoulli, τ", "categorical, m", "categorical, p − 1",
    "categorical, τ",
)  # fmt: skip
"""The masks, and the quantity that varies."""


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each value of each sweep."""
    s = settings
    fixed = {"m": s.m_fixed, "p": s.p_fixed, "xi": s.xi_fixed, "tau": s.tau_fixed}
    categorical = {**fixed, "xi": None}
    found: list[Point] = [
        *({"sweep": "Bernoulli, m", **fixed, "m": m} for m in s.m),
        *({"sweep": "Bernoulli, p", **fixed, "p": p} for p in s.p),
        *({"sweep": "Bernoulli, 1 − ξ", **fixed, "xi": xi} for xi in s.xi),
        *({"sweep": "Bernoulli, τ", **fixed, "tau": tau} for tau in s.tau),
        *({"sweep": "categorical, m", **categorical, "m": m} for m in s.m),
        *({"sweep": "categorical, p − 1", **categorical, "p": p} for p in s.p),
        *({"sweep": "categorical, τ", **categorical, "tau": tau} for tau in s.tau),
    ]
    for sweep in SWEEPS:
        places = {_x(sweep, point) for point in found if point["sweep"] == sweep} - {0.0}
        if len(places) < 2:
            raise ConfigError(f"'{sweep}' has {len(places)} value(s) above 0: an exponent needs at least two")
    for point in found:
        Law(point["m"], point["p"], point["xi"])
    return found


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the floor of each seed."""
    problem = sphere(settings.n, settings.d)
    law = Law(point["m"], point["p"], point["xi"])
    runs = [Run(law, point["tau"], settings.K, settings.eta, seed=seed) for seed in range(settings.seeds)]
    errors = train(problem, runs).errors
    third = settings.K // 3
    last, before = errors[:, -third:].mean(dim=1), errors[:, -2 * third : -third].mean(dim=1)
    return [
        {**point, "seed": seed, "floor": float(a), "before": float(b)}
        for seed, (a, b) in enumerate(zip(last, before, strict=True))
    ]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Plot a panel for each sweep, with fitted exponents and the bound."""
    problem = sphere(settings.n, settings.d)
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    panels = figure.subplots(2, 4).ravel()
    panels[-1].axis("off")
    lines, without_noise, loose = [], [], []
    for axes, sweep in zip(panels, SWEEPS, strict=False):
        measured = []
        for point in [point for point in points(settings) if point["sweep"] == sweep]:
            of_point = rows_at(rows, point)
            one = _Measured(_x(sweep, point), [r["floor"] for r in of_point], [r["before"] for r in of_point],
                            _bound(settings, problem, point))  # fmt: skip
            if one.x == 0:  # gradient descent, without randomness
                without_noise.append(f"{sweep} = 0: {np.mean(one.floors):.1g}")
            else:
                measured.append(one)
        fit = exponent([one.x for one in measured], [one.floors for one in measured])
        bound = exponent([one.x for one in measured], [[one.bound] for one in measured])
        settled = all(one.settled for one in measured)
        ratios = [one.bound / float(np.mean(one.floors)) for one in measured]
        loose += ratios if "Bernoulli" in sweep else []
        lines.append(
            (
                sweep,
                str(fit),
                f"{bound.value:.2f}",
                f"{min(ratios):.2g} to {max(ratios):.2g}",
                "yes" if settled else "no",
            )
        )
        _draw(axes, sweep, measured, f"exponent {fit}", settled)
    wide = settings.n**3 * settings.d / least_eigenvalue(infinite_ntk(problem.inputs, settings.xi_fixed)) ** 2
    return Section(
        title="Error floors of random masks",
        claim="B₁ of Theorem 3 is the error floor of Bernoulli masks; that of categorical masks is O(τ(p − "
        "1)²n³d/(λ₀²m)), which vanishes for p = 1 and as m grows (Theorem 7).",
        method=f"n = {settings.n} inputs on the sphere (one draw), d = {settings.d}, η = {settings.eta:g}, K = "
        f"{settings.K}, {settings.seeds} seeds; floor: mean over the last third. Fixed values: m = "
        f"{settings.m_fixed}, p = {settings.p_fixed}, ξ = {settings.xi_fixed:g}, τ = {settings.tau_fixed}. Exponents "
        "are fitted to the means of the seeds, with 95 % bootstrap intervals over them; the bound's exponent is "
        "fitted to the bound at the same values (λ₀ grows with ξ, and so with 1/p for categorical masks). Settled: "
        "the mean of the last third is within a tenth of that of the third before.",
        found=[
            f"The final error without random masks: {'; '.join(without_noise)}."
            if without_noise
            else "No setting without random masks was measured.",
            f"Theorem 3's bound is {min(loose):.2g} to {max(loose):.2g} times the measured floor. Its hypothesis is a "
            f"width far above n³d/λ₀², which here is {wide:.2g}; practical widths do not meet it.",
        ],
        figures={
            "floors": (figure, "Floors with two standard errors, and bounds (whose hypotheses are not met: see above).")
        },
        tables={"Exponents": Table(("varied", "fitted exponent", "the bound's", "bound / measured", "settled"), lines)},
    )


@dataclass(frozen=True)
class _Measured:
    """The floors of all seeds at one value of a sweep, and the bound there."""

    x: float
    floors: list[float]
    before: list[float]
    bound: float

    @property
    def settled(self) -> bool:
        return bool(abs(np.mean(self.floors) / np.mean(self.before) - 1) < 0.1)


def _draw(axes: Axes, sweep: str, measured: Sequence[_Measured], title: str, settled: bool) -> None:
    xs = [one.x for one in measured]
    means = [float(np.mean(one.floors)) for one in measured]
    errors = [2 * standard_error(one.floors) for one in measured]
    axes.errorbar(xs, means, yerr=errors, marker="o", capsize=2, label="measured")
    label = "bound" if "Bernoulli" in sweep else "bound, up to its constant"
    axes.plot(xs, [one.bound for one in measured], "k--", label=f"{label} (hypothesis on m not met)")
    axes.set_title(f"{sweep}: {title}", fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(sweep.split(", ")[1])
    axes.set_ylabel("error floor (mean over samples)")
    axes.grid(visible=True, alpha=0.3, which="both")
    axes.legend(fontsize=7)
    if not settled:
        axes.text(0.5, 0.5, "some errors still fall:\nnot all are floors", transform=axes.transAxes, ha="center")


def _x(sweep: str, point: Point) -> float:
    varied = sweep.split(", ")[1]
    found = {
        "m": point["m"],
        "p": point["p"],
        "1 − ξ": 1 - (point["xi"] or 0.0),
        "τ": point["tau"],
        "p − 1": point["p"] - 1,
    }
    return float(found[varied])


def _bound(settings: Settings, problem: Problem, point: Point) -> float:
    """Return the bound at a point, as a mean over the samples."""
    law = Law(point["m"], point["p"], point["xi"])
    setting = bound_setting(problem, law, point["tau"], settings.eta)
    return (bounds.categorical_floor if law.xi is None else bounds.bernoulli_floor)(setting) / settings.n

"""Theorem 3 and Theorem 7: measured rates of convergence and the proved ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field

from ist.errors import ConfigError
from ist.theory.algorithm import Run, train
from ist.theory.experiment import Count, Point, Probability, Row, Section, Table, bound_setting, rows_at
from ist.theory.experiment import Settings as Base
from ist.theory.quantities import bounds
from ist.theory.quantities.kernels import infinite_ntk, least_eigenvalue
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import sphere
from ist.theory.quantities.statistics import exponent, standard_error

QUICK: Mapping[str, Any] = {"m": 300, "seeds": 3, "p": (1, 4), "xi": (0.2, 0.8), "tau": (1, 4), "until": 0.6}


class Settings(Base):
    """Settings of the experiment on rates, with inputs drawn from the sphere."""

    n: int = Field(10, ge=2, description="samples")
    d: int = Field(40, ge=2, description="inputs")
    m: int = Field(4096, ge=1, description="hidden neurons")
    p: tuple[Count, ...] = Field((1, 2, 4, 8), min_length=1)
    xi: tuple[Probability, ...] = Field((0.1, 0.3, 0.5, 0.9), min_length=1)
    tau: tuple[Count, ...] = Field((1, 2, 4), min_length=1)
    eta: float = Field(0.02, gt=0, description="step size")
    until: float = Field(0.3, gt=0, lt=1, description="the rate is measured down to this fraction of the first error")
    seeds: int = Field(8, ge=2)


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each setting: Bernoulli by p, xi, tau, and categorical by p, tau."""
    bernoulli = [(p, xi, tau) for p in settings.p for xi in settings.xi for tau in settings.tau]
    categorical = [(p, None, tau) for p in settings.p for tau in settings.tau]
    for p, xi, _ in [*bernoulli, *categorical]:
        Law(settings.m, p, xi)
    if len({(p, xi, tau) for p, xi, tau in bernoulli}) < 2:
        raise ConfigError("'p', 'xi' and 'tau' give fewer than two settings: an exponent needs at least two")
    return [{"p": p, "xi": xi, "tau": tau} for p, xi, tau in [*bernoulli, *categorical]]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the rate of each seed: the mean decrease of the log error per round, while it is above `until`."""
    problem = sphere(settings.n, settings.d)
    law = Law(settings.m, point["p"], point["xi"])
    lambda_0 = least_eigenvalue(infinite_ntk(problem.inputs, law.probability))
    # Twice the rounds that the slowest component of the linearized error needs.
    slowest = 2 * settings.eta * law.theta * point["tau"] * lambda_0
    rounds = int(np.clip(-2 * np.log(settings.until) / slowest, 20, 20_000))
    runs = [Run(law, point["tau"], rounds, settings.eta, seed=seed) for seed in range(settings.seeds)]
    errors = train(problem, runs).errors
    mean = errors.mean(dim=0)
    below = (mean < settings.until * mean[0]).nonzero()
    last = int(below[0]) if len(below) else rounds
    falls = -torch.log(errors[:, last] / errors[:, 0]) / last
    return [
        {**point, "seed": seed, "rounds": last, "reached": bool(len(below)), "fall": float(fall)}
        for seed, fall in enumerate(falls)
    ]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Compare measured and proved rates."""
    problem = sphere(settings.n, settings.d)
    measured = []
    for point in points(settings):
        falls = [row["fall"] for row in rows_at(rows, point)]
        law = Law(settings.m, point["p"], point["xi"])
        setting = bound_setting(problem, law, point["tau"], settings.eta)
        rate = bounds.bernoulli_rate(setting) if point["xi"] else bounds.categorical_rate(setting)
        reached = [row["reached"] for row in rows_at(rows, point)]
        measured.append(_Measured(point, setting, float(-np.log(rate)), falls, all(reached)))
    bernoulli = [one for one in measured if one.point["xi"]]
    fit = exponent(
        [s.step_size * s.theta * s.local_steps * s.lambda_0 for s in (one.setting for one in bernoulli)],
        [one.falls for one in bernoulli],
    )
    slower = sum(one.looseness < 1 for one in measured)
    return Section(
        title="Theorem 3 and Theorem 7: rates",
        claim="The expected squared error falls, down to a floor, by a factor of 1 − ηθτλ₀/4 per round with Bernoulli "
        "masks (θ = 1 − (1 − ξ)^p; Theorem 3), and of 1/2 + (1 − ηλ₀/2)^τ/2 with categorical ones (Theorem 7).",
        method=f"n = {settings.n} inputs on the sphere of d = {settings.d} dimensions, m = {settings.m}, η = "
        f"{settings.eta:g}, {settings.seeds} seeds; the rate is the mean decrease of the log error down to "
        f"{settings.until:.0%} of the first one. The proof retains a quarter of ηθτλ₀. For small η the squared error "
        "of the slowest direction of the linearized dynamics falls by 2ηθτλ₀, eight times as much, and all others "
        "fall faster.",
        found=[
            f"Bernoulli: −log(rate) grows as θτλ₀ to the power of {fit} (95 % over seeds; λ₀ depends only on ξ, η "
            "and the inputs are fixed); proved is 1.",
            f"Measured rates are {min(one.looseness for one in measured):.1f} to "
            f"{max(one.looseness for one in measured):.1f} times as fast as proved ({slower} of {len(measured)} "
            f"settings are slower; {sum(not one.reached for one in measured)} did not reach "
            f"{settings.until:.0%}).",
        ],
        figures={"rates": (_drawn(settings, measured), "Measured and proved rates; bars: two standard errors.")},
        tables={
            "Factors per round": Table(
                ("masks", "p", "τ", "proved", "measured", "times faster", "reached"),
                [one.line() for one in measured],
            )
        },
    )


@dataclass(frozen=True)
class _Measured:
    """The measured decreases of the log error per round, one for each seed, and the proved one."""

    point: Point
    setting: bounds.Setting
    proved: float
    falls: list[float]
    reached: bool

    @property
    def looseness(self) -> float:
        return float(np.mean(self.falls)) / self.proved

    def line(self) -> tuple[str, ...]:
        masks = f"Bernoulli, ξ = {self.point['xi']:g}" if self.point["xi"] else "categorical"
        factors = (f"{np.exp(-self.proved):.6f}", f"{np.exp(-np.mean(self.falls)):.6f}")
        return (
            masks,
            str(self.point["p"]),
            str(self.point["tau"]),
            *factors,
            f"{self.looseness:.1f}",
            "yes" if self.reached else "no",
        )


def _drawn(settings: Settings, measured: Sequence[_Measured]) -> Figure:
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for one in measured:
        axes.errorbar(
            one.proved, float(np.mean(one.falls)), yerr=2 * standard_error(one.falls),
            marker="o" if one.point["xi"] else "s", color=f"C{settings.p.index(one.point['p'])}",
            markersize=4, capsize=2,
        )  # fmt: skip
    reach = np.array([min(one.proved for one in measured), max(one.proved for one in measured)])
    axes.plot(reach, reach, "k--", label="proved: at least this fast")
    axes.plot(reach, 8 * reach, "k:", label="8 × proved: 2ηθτλ₀, the linearized dynamics of the slowest direction")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("−log of the proved factor per round")
    axes.set_ylabel("−log of the measured factor")
    for number, p in enumerate(settings.p):
        axes.plot([], [], color=f"C{number}", marker="o", linestyle="", label=f"p = {p} (squares: categorical)")
    axes.legend(fontsize=7)
    axes.grid(visible=True, alpha=0.3)
    return figure

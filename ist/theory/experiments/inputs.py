"""Gaussian masks on the inputs instead of Bernoulli masks on the neurons: an error that grows with their variance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from ist.theory.algorithm import Run
from ist.theory.experiment import Point, Positive, Row, Section, Table
from ist.theory.experiment import Settings as Base
from ist.theory.noisy_inputs import train_on_masked_inputs
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import sphere
from ist.theory.quantities.statistics import exponent, standard_error

QUICK: Mapping[str, Any] = {"m": 200, "steps": 150, "seeds": 3, "sigma": (0.1, 0.3)}


class Settings(Base):
    """Settings of the experiment, with inputs drawn from the sphere."""

    n: int = Field(10, ge=2, description="samples")
    d: int = Field(40, ge=2, description="inputs")
    m: int = Field(2048, ge=1, description="hidden neurons")
    sigma: tuple[Positive, ...] = Field(
        (0.03, 0.06, 0.12, 0.25, 0.5), min_length=2, description="standard deviations of the masks, above 0"
    )
    eta: float = Field(0.1, gt=0, description="step size")
    steps: int = Field(1000, ge=20)
    seeds: int = Field(8, ge=2)


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each sigma, and one without masks."""
    Law(settings.m, 1, 1.0)
    return [{"sigma": sigma} for sigma in (0.0, *settings.sigma)]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the error of each seed, at twenty steps and averaged over the last third."""
    runs = [Run(Law(settings.m, 1, 1.0), 1, settings.steps, settings.eta, seed=s) for s in range(settings.seeds)]
    errors = train_on_masked_inputs(sphere(settings.n, settings.d), runs, point["sigma"])
    floors = errors[:, -(settings.steps // 3) :].mean(dim=1)
    shown = np.linspace(0, settings.steps, 21).astype(int).tolist()
    return [
        {**point, "seed": seed, "step": step, "error": float(errors[seed, step]), "floor": float(floors[seed])}
        for seed in range(settings.seeds)
        for step in shown
    ]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Plot the errors by step, and the floors by variance."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    floors = {
        sigma: [r["floor"] for r in rows if (r["sigma"], r["step"]) == (sigma, 0)] for sigma in (0.0, *settings.sigma)
    }
    for sigma in floors:
        own = [row for row in rows if row["sigma"] == sigma]
        steps = sorted({row["step"] for row in own})
        left.plot(steps, [np.mean([r["error"] for r in own if r["step"] == s]) for s in steps], label=f"σ = {sigma:g}")
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("mean squared error, unmasked inputs")
    values = [floors[sigma] for sigma in settings.sigma]
    fit = exponent([sigma**2 for sigma in settings.sigma], values)
    right.errorbar(
        [sigma**2 for sigma in settings.sigma], [np.mean(v) for v in values],
        yerr=[2 * standard_error(v) for v in values], marker="o", capsize=2, label=f"exponent {fit}",
    )  # fmt: skip
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("variance σ² of the masks")
    right.set_ylabel("error floor")
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(visible=True, alpha=0.3)
    return Section(
        title="Gaussian masks on the inputs",
        claim="With Gaussian masks on the inputs, gradient descent converges linearly up to an error region "
        "proportional to the masks' variance (Kolomvaki, Liao et al., arXiv 2602.17423).",
        method=f"Inputs x ⊙ c with a new c ~ N(1, σ²) in each step; n = {settings.n} inputs on the sphere, d = "
        f"{settings.d}, m = {settings.m}, η = {settings.eta:g}, {settings.steps} steps, {settings.seeds} seeds. "
        "Errors are on unmasked inputs; the floor is the mean over the last third.",
        found=[
            f"The error floor grows with the variance to the power of {fit} (95 % interval); proportionality means "
            f"1. Without masks it is {np.mean(floors[0.0]):.1g}."
        ],
        figures={"inputs": (figure, "Left: error by step. Right: error floor, with two standard errors.")},
        tables={
            "Floors": Table(
                ("σ", "variance", "error floor"),
                [(f"{s:g}", f"{s * s:.4g}", f"{np.mean(v):.3g} ± {np.std(v):.1g}") for s, v in floors.items()],
            )
        },
    )  # fmt: skip

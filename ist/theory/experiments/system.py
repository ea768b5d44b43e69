"""From theory to practice: real IST on the same network, data and masks gives the same weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field

from ist.theory.algorithm import Run, initial_weights, train
from ist.theory.experiment import Count, DataSettings, Point, Probability, Row, Section, Table
from ist.theory.practice import system_masks, train_with_system
from ist.theory.quantities.masks import Law

QUICK: Mapping[str, Any] = {"samples": 20, "m": 60, "rounds": 4}


class Settings(DataSettings):
    """Settings of the comparison with the real system."""

    m: int = Field(400, ge=1, description="hidden neurons")
    p: int = Field(4, ge=2, description="workers, each with a subnetwork")
    tau: tuple[Count, ...] = Field((1, 5), min_length=1)
    xi: Probability = Field(0.5, description="probability of the Bernoulli masks")
    eta: float = Field(0.02, gt=0, description="step size")
    rounds: int = Field(20, ge=1)
    seed: int = 0


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each distribution of the masks and each tau."""
    Law(settings.m, settings.p, settings.xi)
    return [{"masks": masks, "tau": tau} for masks in ("categorical", "bernoulli") for tau in settings.tau]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Train by Algorithm 1 and by the system, and compare."""
    problem = settings.problem()
    xi = settings.xi if point["masks"] == "bernoulli" else None
    law = Law(settings.m, settings.p, xi)
    run = Run(
        law, point["tau"], settings.rounds, settings.eta, seed=settings.seed, draw=system_masks(law, settings.seed)
    )
    trace = train(problem, [run], "weights")
    weights = train_with_system(problem, run)
    apart = (weights - trace.weights[0]).abs().max()
    return [
        {
            **point,
            "error_at_first": float(trace.errors[0, 0]),
            "error": float(trace.errors[0, -1]),
            "largest_difference": float(apart),
            "identical_share": float((weights == trace.weights[0]).double().mean()),
            "moved": float((weights - initial_weights(run, problem.inputs.shape[1])).abs().max()),
        }
    ]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Plot and tabulate the differences."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['masks']}, τ = {row['tau']}" for row in rows]
    axes.barh(labels, [row["moved"] for row in rows], label="largest movement of a weight in training")
    axes.barh(labels, [max(row["largest_difference"], 1e-18) for row in rows], label="largest difference")
    axes.axvline(np.finfo(np.float64).eps, color="k", linestyle=":", label="precision of float64")
    axes.set_xscale("log")
    axes.legend(fontsize=7)
    lines = [
        (
            row["masks"], str(row["tau"]), f"{row['error_at_first']:.4f}", f"{row['error']:.4f}", f"{row['moved']:.2e}",
            f"{row['largest_difference']:.1e}", f"{row['identical_share']:.0%}",
        )
        for row in rows
    ]  # fmt: skip
    worst = max(row["largest_difference"] for row in rows)
    return Section(
        title="From theory to practice: the system is Algorithm 1",
        claim="The algorithm of the theory and the system that trains real networks are the same for equal settings: "
        "one hidden layer, fixed second layer, full batches, plain SGD.",
        method=f"`ist.train` with {settings.p} workers (inline), float64, {settings.rounds} rounds; Algorithm 1 uses "
        "the partitions that the system draws. All weights are compared at the end.",
        found=[
            f"The largest difference of any weight is {worst:.1e}, {worst / np.finfo(np.float64).eps:.0f} times the "
            f"precision of float64; weights moved by up to {max(row['moved'] for row in rows):.1e} in training."
        ],
        figures={"system": (figure, "Difference between theory and system, and movement in training.")},
        tables={"Theory and system": Table(
            ("masks", "τ", "first error", "last error", "weights moved", "largest difference", "bit-identical"), lines
        )},
    )  # fmt: skip

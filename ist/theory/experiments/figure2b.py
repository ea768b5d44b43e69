"""[MRN] figure 2b: the final error by number of subnetworks p and probability xi, with Bernoulli masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from ist.theory.experiment import Point, Probability, Row, Section, grid_of, mean_by
from ist.theory.experiments.maps import MapSettings, map_table, side_by_side
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import Scaling
from ist.theory.quantities.published import FIGURE_2B, XI
from ist.theory.quantities.statistics import rank_correlation, rank_correlations, typical_ratio

QUICK: Mapping[str, Any] = {
    "samples": 30,
    "m": 300,
    "K": 60,
    "tail": 20,
    "seeds": 1,
    "p": (1, 4, 10),
    "xi": (0.1, 0.5, 1.0),
}


class Settings(MapSettings):
    """Settings of figure 2b."""

    xi: tuple[Probability, ...] = Field(XI, min_length=2, description="probabilities that a subnetwork holds a neuron")
    tau: int = Field(1, ge=1, description="local steps")
    scaling: Scaling = Field("standardised", description="'standardised' columns, or 'raw' ones")
    eta: float = Field(0.024, gt=0, description="step size")
    seeds: int = Field(2, ge=1)


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each cell and seed."""
    cells = [(p, xi) for p in settings.p for xi in settings.xi]
    for p, xi in cells:
        Law(settings.m, p, xi)
    return [{"p": p, "xi": xi, "seed": seed} for p, xi in cells for seed in range(settings.seeds)]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the error of a cell."""
    law = Law(settings.m, point["p"], point["xi"])
    return [{**point, "error": settings.final_error(law, settings.tau, settings.K, settings.eta, point["seed"])}]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Compare our map with the published one."""
    ours = grid_of(mean_by(rows, ("p", "xi"), "error"), settings.p, settings.xi)
    maps = [(f"ours, m = {settings.m}, τ = {settings.tau}, η = {settings.eta:g}", ours)]
    found = [
        f"From p = {settings.p[0]} to p = {settings.p[-1]} the error falls in {np.mean(ours[-1] < ours[0]):.0%} of "
        f"the columns, and from ξ = {settings.xi[0]:g} to ξ = {settings.xi[-1]:g} in "
        f"{np.mean(ours[:, -1] < ours[:, 0]):.0%} of the rows.",
    ]
    theirs = published(settings.p, settings.xi) if settings.is_published else None
    if theirs is not None:
        maps.append(("published", theirs))
        alike = rank_correlations(ours, theirs)
        theta = np.array([[Law(settings.m, p, xi).theta for xi in settings.xi] for p in settings.p])
        found += [
            f"Spearman's rank correlation with the published map: {alike.rows:.2f} along ξ (mean of the rows), "
            f"{alike.columns:.2f} along p (mean of the columns that vary: with ξ = 1 every p gives the same gradient "
            f"descent), {alike.whole:.2f} over all cells; values typically differ by a factor of "
            f"{typical_ratio(ours, theirs):.2f}.",
            "With θ = 1 − (1 − ξ)^p, the probability that a neuron is trained in a round, the rank correlation over "
            f"all cells is {rank_correlation(theirs, theta):.2f} for the published map, "
            f"{rank_correlation(ours, theta):.2f} for ours.",
        ]
    return Section(
        title="Figure 2b: more and larger subnetworks give a lower final error",
        claim="With Bernoulli masks the final error falls with the number p of subnetworks and with the probability "
        "ξ that a subnetwork holds a neuron (Theorem 3: error floor and rate).",
        method=f"Data: {settings.describe()}; K = {settings.K} rounds, κ = {settings.kappa:g}; each cell is the mean "
        f"squared error of the full network, averaged over the last {settings.tail} rounds and {settings.seeds} "
        "seed(s). Step size, τ and preprocessing are not published: see 'Which settings reproduce the maps'.",
        found=found,
        figures={
            "figure2b": (side_by_side(maps, settings.p, settings.xi, "probability ξ"), "Final error, ours and theirs.")
        },
        tables={"Our values": map_table(ours, settings.p, settings.xi, "ξ")},
    )


def published(p: Sequence[int], xi: Sequence[float]) -> Any:
    """Return the published values of the cells; None if one of them is not published."""
    if not (set(p) <= set(range(1, 11)) and set(xi) <= set(XI)):
        return None
    return np.array([[FIGURE_2B[row - 1][XI.index(column)] for column in xi] for row in p])

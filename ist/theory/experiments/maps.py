"""Code shared by figures 2b and 2c: settings, the error of a cell, and plots of maps."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import Field

from ist.theory.algorithm import Run, train
from ist.theory.experiment import Count, DataSettings, Table
from ist.theory.quantities.masks import Law

Matrix = NDArray[np.float64]


class MapSettings(DataSettings):
    """Settings of both maps."""

    m: int = Field(4000, ge=1, description="hidden neurons")
    p: tuple[Count, ...] = Field(tuple(range(1, 11)), min_length=2, description="numbers of subnetworks")
    K: int = Field(200, ge=2, description="rounds")
    kappa: float = Field(1.0, gt=0, description="standard deviation of the initial weights")
    tail: int = Field(50, ge=1, description="last rounds over which the error is averaged; at most a quarter of them")
    seeds: int = Field(1, ge=1)
    dtype: Literal["float64", "float32"] = "float64"

    def final_error(self, law: Law, local_steps: int, rounds: int, step_size: float, seed: int) -> float:
        """Train one network, and return its error averaged over the last rounds."""
        run = Run(law, local_steps, rounds, step_size, self.kappa, seed)
        errors = train(self.problem(), [run], dtype=getattr(torch, self.dtype)).errors[0]
        return float(errors[-min(self.tail, max(1, rounds // 4)) :].mean())


def side_by_side(
    maps: Sequence[tuple[str, Matrix]], rows: Sequence[Any], columns: Sequence[Any], column_name: str
) -> Figure:
    """Plot maps (p by rows, another quantity by columns) with a common color scale."""
    figure = Figure(figsize=(5.6 * len(maps), 4.6), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    scale = LogNorm(min(float(m.min()) for _, m in maps), max(float(m.max()) for _, m in maps))
    for axes, (title, values) in zip(panels, maps, strict=True):
        image = axes.imshow(values, norm=scale, cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
        axes.set_yticks(range(len(rows)), [str(row) for row in rows])
        axes.set_xlabel(column_name)
        axes.set_ylabel("subnetworks p")
        if len(columns) <= 12:
            for (y, x), value in np.ndenumerate(values):
                dark = scale(value) < 0.6
                axes.text(
                    x, y, f"{value:.4f}".lstrip("0"), ha="center", va="center", fontsize=6.5, color="w" if dark else "k"
                )
    figure.colorbar(image, ax=list(panels), label="mean squared training error")
    return figure


def map_table(values: Matrix, rows: Sequence[Any], columns: Sequence[Any], name: str) -> Table:
    """Return a map as a table."""
    return Table(
        ("p", *(f"{name} = {column:g}" for column in columns)),
        [(str(row), *(f"{value:.4f}" for value in line)) for row, line in zip(rows, values, strict=True)],
    )

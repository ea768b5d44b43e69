"""Two heat maps side by side, ours and the published one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ist.theory.experiment import Table

Matrix = NDArray[np.float64]


def side_by_side(
    maps: Sequence[tuple[str, Matrix]], rows: Sequence[Any], columns: Sequence[Any], column_name: str
) -> Figure:
    """Draw maps (p down, something across) with one scale of colours."""
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

"""Draw the pictures of docs/groups.md.

python docs/pictures.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
HELD, OTHER, INK = "#2f6db3", "#d9e4f1", "#333333"


def matrix(axes: Axes, x: float, y: float, rows: str, columns: str, name: str) -> None:
    """Draw a weight with the rows and columns of one subnet; 'x' is held, '.' is not, 's' is shared by all."""
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            color = HELD if row in "xs" and column in "xs" else OTHER
            axes.add_patch(Rectangle((x + j, y - i - 1), 1, 1, facecolor=color, edgecolor="white"))
    axes.text(x + len(columns) / 2, y - len(rows) - 0.3, name, ha="center", va="top", color=INK, fontsize=9)


def arrow(axes: Axes, x: float, y: float, to_x: float, to_y: float) -> None:
    """Draw the way that activations take."""
    axes.add_patch(FancyArrowPatch((x, y), (to_x, to_y), arrowstyle="->", mutation_scale=12, color=INK))


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty drawing."""
    figure, axes = plt.subplots(figsize=(width / 4, height / 4))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def perceptron() -> Figure:
    """Neurons of two hidden layers in three weights."""
    figure, axes = canvas(34, 11)
    matrix(axes, 1, 9, "x..x.x", "ssss", "first.weight\n(hidden 1, inputs)")
    arrow(axes, 5.5, 6, 10, 6)
    matrix(axes, 11, 9, ".xx.x", "x..x.x", "second.weight\n(hidden 2, hidden 1)")
    arrow(axes, 17.5, 6, 23, 6)
    matrix(axes, 24, 9, "sss", ".xx.x", "last.weight\n(outputs, hidden 2)")
    return figure


def attention() -> Figure:
    """An attention head in four weights."""
    figure, axes = canvas(44, 12)
    for number, name in enumerate(["query", "key", "value"]):
        matrix(axes, 1 + 9 * number, 10, "xxx......", "sssss", f"{name}.weight")
    arrow(axes, 25.5, 6, 30, 6)
    matrix(axes, 31, 8, "sssss", "xxx......", "out.weight")
    axes.text(20, 11, "one head of three: three rows of each projection, three columns of the last", ha="center",
              color=INK, fontsize=9)  # fmt: skip
    return figure


def residual() -> Figure:
    """A residual block: what is between the convolutions is hidden, what is added up is the stream."""
    figure, axes = canvas(40, 12)
    axes.plot([1, 39], [9, 9], color="#a0895a", linewidth=5, solid_capstyle="butt")
    axes.text(2, 10, "residual stream: shared by default", color=INK, fontsize=9)
    for x, name in ((10, "conv 1"), (24, "conv 2")):
        axes.add_patch(Rectangle((x, 2), 6, 3, facecolor="white", edgecolor=INK))
        axes.text(x + 3, 3.5, name, ha="center", va="center", color=INK, fontsize=9)
    axes.plot([16, 24], [3.5, 3.5], color=HELD, linewidth=5, solid_capstyle="butt")
    axes.text(20, 1, "hidden channels: assigned to workers", ha="center", color=INK, fontsize=9)
    arrow(axes, 7, 9, 10, 4)
    arrow(axes, 30, 4, 34, 9)
    axes.text(34, 10.3, "+", ha="center", va="center", color=INK, fontsize=14)
    return figure


def main() -> None:
    """Write the pictures beside this file."""
    for name, draw in (("perceptron", perceptron), ("attention", attention), ("residual", residual)):
        draw().savefig(HERE / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()

"""Plots of finished runs, as SVG text for an HTML page.

Where it sits: `ist/report/page.py` puts them into the page.
Not here: which numbers are plotted (`ist/measurements.py`).
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ist.errors import printable
from ist.measurements import MEASUREMENTS
from ist.monitoring.display import format_metric, metric_title

_COLORS = 10
"""Number of colors in matplotlib's cycle; further lines are dashed."""

Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def axes_of_curves() -> list[tuple[str, str, str]]:
    """Return the x axes of the plots: the key in a record, the axis title, and the scale."""
    return [(m.name, m.axis.title, m.axis.scale) for m in MEASUREMENTS if m.axis]


def curve_plot(curves: Curves, x: str, x_label: str, x_scale: str) -> str:
    """Plot a run's metric on the test data (or the loss, without a metric) against a counter.

    Args:
        curves: Records of each run by its label; records without an evaluation are skipped.
        x: The counter's key in a record.
        x_label: Title of the axis.
        x_scale: 'linear' or 'log'.

    Returns:
        A self-contained `<svg>` element.
    """
    seen = {label: [r for r in records if x in r] for label, records in curves.items()}
    names = [record.get("metric", "accuracy") for records in seen.values() for record in records]
    y = next((n for n in names if n and any(r.get(n) is not None for rs in seen.values() for r in rs)), "test_loss")
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, records in enumerate(seen.values()):
        points = [(record[x], record[y]) for record in records if record.get(y) is not None]
        style = "solid" if number < _COLORS else "dashed"
        places = [p[0] for p in points], [p[1] for p in points]
        axes.plot(*places, label=f"run {number}", linewidth=1.4, linestyle=style, marker=".")
    axes.set_xscale(x_scale)
    axes.set_xlabel(x_label)
    axes.set_ylabel("test loss" if y == "test_loss" else f"test {_literal(metric_title(y))}")
    axes.grid(visible=True, alpha=0.3)
    if format_metric(y, 0.5).endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend = axes.legend()
    for text, label in zip(legend.get_texts(), seen, strict=True):
        text.set_text(_literal(label))
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def phase_plot(curves: Curves) -> str:
    """Plot the seconds of each run by phase, as stacked bars; return an `<svg>` element."""
    phases = {measured.name: measured.phase for measured in MEASUREMENTS if measured.phase}
    figure = Figure(figsize=(16.8, 1.2 + 0.6 * len(curves)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(curves)
    for key, label in phases.items():
        widths = [sum(record.get(key, 0) for record in records) for records in curves.values()]
        axes.barh(range(len(curves)), widths, left=left, label=label, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(curves)), [_literal(label) for label in curves])
    axes.set_xlabel("seconds (mean of the workers)")
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def _literal(text: str) -> str:
    """Return a text that matplotlib shows unchanged; it would interpret text between dollar signs as a formula."""
    return printable(text).replace("$", r"\$")


def svg(figure: Figure) -> str:
    """Return a figure as a self-contained `<svg>` element."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ist"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

"""The HTML page about a plan: one self-contained file, readable without a network.

Where it sits: `ist plan --report` calls `write_plan_page`.
Not here: computing the plan (`ist/plan/predict.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from ist._version import VERSION
from ist.config.methods import method_spec
from ist.monitoring.display import memory_cells
from ist.plan.show import (
    COLUMNS,
    describe_hosts,
    ending_lines,
    memory_by_process,
    memory_notes,
    plan_rows,
    round_titles,
)
from ist.report.page import render, write_page
from ist.report.plots import svg


def write_plan_page(found: Mapping[str, Any], path: Path) -> Path:
    """Write the page about a plan with a simulation; return `path`.

    Raises:
        RunFolderError: The file cannot be written.
    """
    page = render(
        "plan.html",
        plan=found,
        hosts=describe_hosts(found),
        version=VERSION,
        columns=COLUMNS,
        rows=plan_rows(found),
        titles=round_titles(found),
        memory={n: memory_cells(processes) for n, processes in memory_by_process(found).items()},
        memory_notes=memory_notes(found),
        plot=Markup(simulation_plot(found["simulation"])),
        ends=ending_lines(found),
    )
    return write_page(path, page)


def simulation_plot(simulation: Mapping[str, Any]) -> str:
    """Plot seconds of an epoch against workers, one panel per rate, one line per method; return an `<svg>` element."""
    rates, points = simulation["rates_mbit"], simulation["points"]
    figure = Figure(figsize=(16.8, 5.2), layout="constrained")
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(point["method"] for point in points))
    for axes, rate in zip(panels, rates, strict=True):
        for number, method in enumerate(methods):
            own = [point for point in points if point["rate_mbit"] == rate and point["method"] == method]
            axes.plot(
                [point["workers"] for point in own],
                [point["epoch_s"] for point in own],
                label=method,
                color=f"C{number}",
                linewidth=2.6 if method_spec(method).needs_groups else 1.5,
                linestyle=("-", "--")[number % 2],  # some lines coincide: a dashed line above a solid one shows both
                zorder=2 + number % 2,
                marker="o",
                markersize=3,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{rate:g} Mbit/s" if rate < 1000 else f"{rate / 1000:g} Gbit/s")
        axes.set_xlabel("workers")
        ticks = sorted({point["workers"] for point in points})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds of an epoch")
    if methods:
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)

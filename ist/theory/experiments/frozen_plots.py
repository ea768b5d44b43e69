"""The plots of the experiment `frozen`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ist.theory.experiments.frozen_results import Measured, Settings, Vector

_STYLES = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", (0, (5, 1, 1, 1))), ("P", (0, (1, 1))))
"""Marker and line style for each tau, so that curves differ without colors."""

CAPTION = (
    "Above: error by round; measured and predicted factors of all settings; factor by γ. Below: limit of γ (bars: "
    "between the largest stable and the smallest unstable value); best γ; error on the data set after the last round, "
    "by γ. Markers: measured; lines without markers: closed form."
)


def drawn(settings: Settings, frozen: Sequence[Measured], absent: Mapping[tuple[Any, ...], Sequence[Vector]]) -> Figure:
    """Plot curves, factors, limits and best merge scales; `absent` has the curves without the rest, by place."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    panels = figure.subplots(2, 3)
    sphere_points = [one for one in frozen if one.point["case"] == "sphere" and one.point["xi"] is None]
    shown = sphere_points[-1]  # the most subnetworks and local steps
    middle = [one for one in sphere_points if one.point["p"] == shown.point["p"]]
    of_shown = middle[min(len(middle) - 1, len(settings.tau) // 2)]
    _draw_curves(panels[0][0], of_shown, absent[of_shown.place])
    _draw_factors(panels[0][1], settings, frozen)
    _draw_by_scale(panels[0][2], settings, middle)
    _draw_limits(panels[1][0], settings, sphere_points)
    _draw_best(panels[1][1], settings, sphere_points)
    data = [one for one in frozen if one.point["case"] == "data set" and one.point["p"] == settings.p_data[-1]]
    _draw_data(panels[1][2], settings, data, absent)
    for axes in panels.ravel():
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _style(settings: Settings, tau: int) -> tuple[str, str, Any]:
    """Return color, marker and line style of a tau."""
    number = settings.tau.index(tau)
    return f"C{number}", *_STYLES[number % len(_STYLES)]


def _draw_curves(axes: Axes, one: Measured, absent: Sequence[Vector]) -> None:
    scales = one.setup.scales
    for number, gamma in enumerate(scales[:: max(1, len(scales) // 5)]):
        curve, (marker, _) = one.curves(gamma)[0], _STYLES[number % len(_STYLES)]
        axes.plot(
            curve, color=f"C{number}", marker=marker, markevery=4, markersize=4, linestyle="", label=f"γ = {gamma:.3g}"
        )
        axes.plot(one.setup.predicted(gamma, 0, len(curve) - 1), color=f"C{number}", linewidth=0.8)
    axes.plot(absent[0], "k--", linewidth=1.6, label="rest absent, γ = 1")
    axes.set_yscale("log")
    axes.set_ylim(1e-16, 1e4)
    axes.set_title(f"sphere, p = {one.point['p']}, τ = {one.point['tau']}: limit of γ {one.limit:.3f}", fontsize=10)
    axes.set_xlabel("round")
    axes.set_ylabel("mean squared error")


def _draw_factors(axes: Axes, settings: Settings, frozen: Sequence[Measured]) -> None:
    for tau in settings.tau:
        color, marker, _ = _style(settings, tau)
        rates = [rate for one in frozen if one.point["tau"] == tau for rate in one.rates]
        axes.plot(
            [rate.predicted for rate in rates], [rate.measured for rate in rates], color=color, marker=marker,
            markersize=4, linestyle="", markerfacecolor="none", label=f"τ = {tau}",
        )  # fmt: skip
    axes.plot([0, 2], [0, 2], "k-", linewidth=0.8, label="equal")
    axes.axvline(1, color="k", linestyle=":", linewidth=0.8)
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 2)
    axes.set_title("all settings", fontsize=10)
    axes.set_xlabel("predicted factor of ‖e‖ per round")
    axes.set_ylabel("measured factor")


def _draw_by_scale(axes: Axes, settings: Settings, points_of_p: Sequence[Measured]) -> None:
    for one in points_of_p:
        color, marker, style = _style(settings, one.point["tau"])
        gammas = [rate.gamma for rate in one.rates]
        axes.plot(gammas, [rate.predicted for rate in one.rates], color=color, linestyle=style, linewidth=1)
        measured = [rate.measured for rate in one.rates]
        axes.plot(
            gammas, measured, color=color, marker=marker, linestyle="", markersize=5, label=f"τ = {one.point['tau']}"
        )
    axes.axhline(1, color="k", linestyle=":", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.6)
    axes.set_title(f"sphere, p = {points_of_p[0].point['p']}", fontsize=10)
    axes.set_xlabel("merge scale γ")
    axes.set_ylabel("factor of ‖e‖ per round")


def _draw_limits(axes: Axes, settings: Settings, sphere_points: Sequence[Measured]) -> None:
    for tau in settings.tau:
        color, marker, style = _style(settings, tau)
        own = [one for one in sphere_points if one.point["tau"] == tau]
        axes.plot(settings.p, [one.limit for one in own], color=color, linestyle=style, linewidth=1)
        bracketed = [(one.point["p"], *one.bracket) for one in own if np.isfinite(one.bracket[1])]
        if bracketed:
            places, low, high = (np.array(values) for values in zip(*bracketed, strict=True))
            middle = np.sqrt(low * high)
            axes.errorbar(
                places, middle, yerr=(middle - low, high - middle), color=color, marker=marker, markersize=4,
                linestyle="", capsize=3, label=f"τ = {tau}",
            )  # fmt: skip
        else:
            axes.plot([], [], color=color, linestyle=style, label=f"τ = {tau}: stable up to γ = 1")
    axes.plot(settings.p, [2 / p for p in settings.p], "k", linewidth=2, alpha=0.3, label="2/p")
    axes.axhline(1, color="k", linestyle=":", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_title("sphere, categorical: limit of γ", fontsize=10)
    axes.set_xlabel("subnetworks p")
    axes.set_ylabel("largest stable γ")


def _draw_best(axes: Axes, settings: Settings, sphere_points: Sequence[Measured]) -> None:
    for tau in settings.tau:
        color, marker, style = _style(settings, tau)
        own = [one for one in sphere_points if one.point["tau"] == tau]
        axes.plot(settings.p, [one.minimax for one in own], color=color, linestyle=style, linewidth=1)
        axes.plot(
            settings.p, [one.best for one in own], color=color, marker=marker, markersize=5, linestyle="",
            label=f"τ = {tau}",
        )  # fmt: skip
    axes.plot(settings.p, [1 / p for p in settings.p], "k", linewidth=2, alpha=0.3, label="1/p")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_title("sphere, categorical: best γ (lines: minimax)", fontsize=10)
    axes.set_xlabel("subnetworks p")
    axes.set_ylabel("best γ")


def _draw_data(
    axes: Axes, settings: Settings, data: Sequence[Measured], absent: Mapping[tuple[Any, ...], Sequence[Vector]]
) -> None:
    for one in data:
        color, marker, style = _style(settings, one.point["tau"])
        ends = [float(np.mean([curve[-1] for curve in one.curves(gamma)])) for gamma in one.setup.scales]
        axes.plot(one.setup.scales, ends, color=color, marker=marker, linestyle="", label=f"τ = {one.point['tau']}")
        predicted = [one.setup.predicted(gamma, 0, settings.K)[-1] for gamma in one.setup.scales]
        axes.plot(one.setup.scales, predicted, color=color, linestyle=style, linewidth=1)
        floor = float(np.mean([curve[-1] for curve in absent[one.place]]))
        axes.plot(1, floor, color=color, marker=marker, markerfacecolor="none", markersize=10)
    axes.plot([], [], "ko", markerfacecolor="none", markersize=10, label="rest absent, γ = 1")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(1e-16, 1e4)
    axes.set_title(f"data set, p = {settings.p_data[-1]}", fontsize=10)
    axes.set_xlabel("merge scale γ")
    axes.set_ylabel(f"mean squared error after {settings.K} rounds")

"""Theorem 2: does the least eigenvalue of masked kernels stay above lambda_0 / 2 in training?"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from ist.theory.algorithm import Run, initial_weights, train
from ist.theory.experiment import Count, DataSettings, Point, Probability, Row, Section, Table, bound_setting
from ist.theory.quantities import bounds
from ist.theory.quantities.kernels import finite_ntk, least_eigenvalue
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import Problem, sphere

QUICK: Mapping[str, Any] = {"samples": 20, "K": 20, "looks": 5, "m": (200, 1000), "m_practical": (300,)}


class Settings(DataSettings):
    """Settings of the experiment on kernels."""

    m: tuple[Count, ...] = Field((1000, 4000, 16000), min_length=1, description="widths on the sphere")
    n: int = Field(10, ge=2, description="inputs on the sphere")
    d: int = Field(40, ge=2, description="their dimensions")
    m_practical: tuple[Count, ...] = Field((1000, 4000), min_length=1, description="widths on the data set")
    p: int = Field(4, ge=1, description="subnetworks")
    xi: Probability = Field(0.5, description="probability that a subnetwork holds a neuron")
    tau: int = Field(5, ge=1, description="local steps")
    K: int = Field(200, ge=2, description="rounds")
    eta: float = Field(0.02, gt=0, description="step size")
    looks: int = Field(20, ge=2, description="number of rounds in which the kernels are computed")
    seed: int = 0


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each problem and width."""
    cases = [("sphere", m) for m in settings.m] + [("data set", m) for m in settings.m_practical]
    for _, m in cases:
        Law(m, settings.p, settings.xi)
    return [{"case": case, "m": m} for case, m in cases]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the least eigenvalues of the full and the masked kernels, and the movement of weights, during a run."""
    problem = _problem(settings, point)
    run = Run(Law(point["m"], settings.p, settings.xi), settings.tau, settings.K, settings.eta, seed=settings.seed)
    first = initial_weights(run, problem.inputs.shape[1])
    every = max(1, settings.K // settings.looks)
    rows: list[Row] = []

    def observe(round_number: int, weights: Tensor, masks: Tensor) -> None:
        if round_number % every:
            return
        rows.append(
            {
                **point,
                "round": round_number,
                "whole": settings.xi * least_eigenvalue(finite_ntk(problem.inputs, weights[0])),
                "masked": least_eigenvalue(finite_ntk(problem.inputs, weights[0], masks[0])),
                "moved": float((weights[0] - first).norm(dim=1).max()),
            }
        )

    errors = train(problem, [run], "weights", observe=observe).errors[0]
    return [{**row, "error": float(errors[row["round"]])} for row in rows]


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Compare the eigenvalues during training with lambda_0 / 2, and the movement of weights with R."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    panels = figure.subplots(2, 2)
    lines: list[tuple[str, ...]] = []
    moved: list[float] = []
    for column, case in enumerate(("sphere", "data set")):
        points_of_case = [point for point in points(settings) if point["case"] == case]
        problem = _problem(settings, points_of_case[0])
        law = Law(points_of_case[0]["m"], settings.p, settings.xi)
        theory = bound_setting(problem, law, settings.tau, settings.eta)
        of_case = [row for row in rows if row["case"] == case]
        lines += [_line(point, of_case, theory) for point in points_of_case]
        title = settings.describe() if column else f"n = {settings.n} inputs on the sphere, d = {settings.d}"
        _draw(panels[0][column], panels[1][column], title, of_case, theory)
        moved += [
            max(r["moved"] for r in of_case if r["m"] == one["m"]) / bounds.radius(theory) for one in points_of_case
        ]
    holds = sum(line[5] == "yes" for line in lines)
    met = [line for line in lines if line[8] == "yes"]
    num_rounds = len({row["round"] for row in rows})
    return Section(
        title="Theorem 2: masked kernels stay well conditioned",
        claim="While each weight vector stays within R = κλ₀/(8n) of its initial value, the kernels of all subnetworks "
        "have a least eigenvalue of at least λ₀/2, where λ₀ is that of the infinitely wide kernel (with its factor ξ).",
        method=f"Bernoulli masks, p = {settings.p}, ξ = {settings.xi:g}, τ = {settings.tau}, η = {settings.eta:g}, K "
        f"= {settings.K}; λ₀ in closed form, the others from the network's activation patterns in float64.",
        found=[
            f"At the start of {num_rounds} rounds, the masked kernels were above λ₀/2 in {holds} of {len(lines)} "
            f"settings. The theorem's hypothesis (no neuron moves farther than R) was met in {len(met)}"
            + (f", and its conclusion held in {sum(line[5] == 'yes' for line in met)} of these." if met else ".")
            + f" Weights moved {min(moved):.3g} to {max(moved):,.3g} times R.",
        ],
        figures={"kernels": (figure, "Above: least eigenvalues during training. Below: movement of the weights.")},
        tables={
            "Theorem 2 in numbers": Table(
                ("case", "m", "λ₀", "least masked eigenvalue", "in units of λ₀", "≥ λ₀/2", "moved", "R", "within R"),
                lines,
            )
        },
    )


def _line(point: Point, rows: Sequence[Row], theory: bounds.Setting) -> tuple[str, ...]:
    own = [row for row in rows if row["m"] == point["m"]]
    least, moved = min(row["masked"] for row in own), max(row["moved"] for row in own)
    lambda_0, radius = theory.lambda_0, bounds.radius(theory)
    return (
        point["case"], str(point["m"]), f"{lambda_0:.4g}", f"{least:.4g}", f"{least / lambda_0:.2f}",
        "yes" if least >= lambda_0 / 2 else "no", f"{moved:.3g}", f"{radius:.2g}", "yes" if moved <= radius else "no",
    )  # fmt: skip


def _draw(upper: Axes, lower: Axes, title: str, rows: Sequence[Row], theory: bounds.Setting) -> None:
    for number, width in enumerate(dict.fromkeys(row["m"] for row in rows)):
        own = [row for row in rows if row["m"] == width]
        rounds = [row["round"] for row in own]
        color = f"C{number}"
        upper.plot(rounds, [row["masked"] for row in own], color=color, label=f"m = {width}: least of the masked")
        upper.plot(rounds, [row["whole"] for row in own], color=color, linestyle=":", label="ξ × full network")
        lower.plot(rounds, [row["moved"] for row in own], color=color, label=f"m = {width}")
    upper.axhline(theory.lambda_0 / 2, color="k", linestyle="--", label="λ₀/2 (Theorem 2)")
    upper.set_title(title)
    upper.set_ylabel("least eigenvalue")
    lower.axhline(bounds.radius(theory), color="k", linestyle="--", label="R = κλ₀/(8n)")
    lower.set_yscale("log")
    lower.set_ylabel("largest movement of a neuron")
    if any(row["moved"] > bounds.radius(theory) for row in rows):
        note = "above R: the hypothesis of Theorem 2 is not met"
        lower.text(0.5, 0.06, note, transform=lower.transAxes, ha="center")
    for axes in (upper, lower):
        axes.set_xlabel("round")
        axes.legend(fontsize=7)
        axes.grid(visible=True, alpha=0.3)


def _problem(settings: Settings, point: Point) -> Problem:
    return sphere(settings.n, settings.d) if point["case"] == "sphere" else settings.problem()
